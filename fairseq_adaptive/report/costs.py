"""Where the multiply-adds of a model go: by part and by depth, as torch's ``FlopCounterMode`` counts what runs.

Two FLOPs are one multiply-add. Only matrix products count, as in
:mod:`~fairseq_adaptive.modules.stack.compute`, whose closed forms are tested against the same counter.
"""

import contextlib
from collections import defaultdict
from typing import Callable, Dict, Iterator, NamedTuple, Optional, Tuple

from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils.flop_counter import FlopCounterMode

import fairseq_adaptive.ops  # noqa: F401  registers what torch does not count
from fairseq_adaptive.criterions.decisions import decisions
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules import LayerStack
from fairseq_adaptive.modules.layers.known import same
from fairseq_adaptive.modules.policies import Reader
from fairseq_adaptive.modules.policies.tape import InputBank, LearnedBank
from fairseq_adaptive.modules.stack.packed_context import PackedContext

EMBEDDING, ATTENTION, FEED_FORWARD, POLICIES, OUTPUT, OTHER = PARTS = (
    "embedding",
    "attention",
    "feed-forward",
    "policies",
    "output layer",
    "other",
)
_FEED_FORWARD = ("fc1", "fc2")  # what the two maps of a feed-forward are called, in fairseq and here
_METHODS = {"router": ("choose", "combine"), "halting": ("step", "output"), "reader": ("read",)}


class Place(NamedTuple):
    """What some multiply-adds were for: one of :data:`PARTS`, and the stack and the depth, None outside of stacks."""

    part: str
    stack: Optional[str] = None
    depth: Optional[int] = None


def stacks_of(model: nn.Module) -> Dict[str, nn.Module]:
    """The stacks of a model by name: ours, and the lists of layers of stock models, each layer a depth."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, LayerStack)}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{each}.") for each in found)
        if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] == "layers" and len(module) and not inside:
            found[name] = module
    return {name: found[name] for name, _ in model.named_modules() if name in found}


class Costs:
    """Counts the multiply-adds of calls of a model; its weights, its output and what runs stay as they are.

    Outside of stacks, what comes before the layers is the embedding, and what comes after them, in the criterion as well,
    the output layer; a halting rule that reads scores of words is a policy. In a layer all but the feed-forward is
    attention, and a convolution in its place. Of a model without layers all is the part ``other``.

    Args:
        model: a fairseq model

    Raises:
        UsageError: for a recurrent one, whose products torch does not count

    Attributes:
        counts: multiply-adds by :class:`Place`
    """

    def __init__(self, model: nn.Module):
        self.counts: Dict[Place, float] = defaultdict(float)
        self._model, self._stacks = model, stacks_of(model)
        recurrent = next((each for each in model.modules() if isinstance(each, (nn.RNNBase, nn.RNNCellBase))), None)
        if recurrent is not None:
            raise UsageError(
                f"torch does not count what an {type(recurrent).__name__} computes: report models without recurrent layers"
            )
        self._counter, self._seen, self._path, self._depths = None, 0, [], {}
        self._after = False  # of the part of the model that runs, the layers have run
        self._enter: Dict[nn.Module, Callable[[], Optional[Place]]] = {}
        modules = dict(model.named_modules())
        for name, stack in self._stacks.items():
            self._enter[modules[name.rpartition(".")[0]]] = self._begin
            if isinstance(stack, LayerStack):
                self._enter[stack] = lambda name=name: Place(ATTENTION, name, self._depths.get(name))
                layers = [(stack.layer(number), None) for number in range(stack.unique_layers)]
            else:
                layers = [(layer, depth) for depth, layer in enumerate(stack)]
            for layer, depth in layers:
                if depth is not None:
                    self._enter[layer] = lambda place=Place(ATTENTION, name, depth): place
                for inner, module in layer.named_modules():
                    if inner.rpartition(".")[2] in _FEED_FORWARD:
                        self._enter[module] = lambda: self._path[-1]._replace(part=FEED_FORWARD)

    def total(self, part: Optional[str] = None, stack: Optional[str] = None, depth: Optional[int] = None) -> float:
        """The sum over the places that have what is given."""
        asked = (part, stack, depth)
        return sum(
            count
            for place, count in self.counts.items()
            if all(wanted in (None, there) for wanted, there in zip(asked, place))
        )

    def count(self, call: Callable[[], object]) -> None:
        """Add the multiply-adds of a call."""
        self._seen, self._path, self._depths, self._after = 0, [], {}, False
        with self._watched(), FlopCounterMode(display=False) as self._counter:
            call()
            self._settle()

    def _begin(self):
        self._after = False

    def _settle(self):
        """Book what was counted since the last time on where that was."""
        now = self._counter.get_total_flops()
        if now > self._seen:
            outside = OTHER if not self._stacks else OUTPUT if self._after else EMBEDDING
            place = self._path[-1] if self._path else Place(outside)
            self.counts[place] += (now - self._seen) / 2
        self._seen = now

    @contextlib.contextmanager
    def _at(self, place: Place):
        self._settle()
        self._path.append(place)
        yield
        self._settle()
        self._path.pop()

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """Hooks that see every call of a module, and methods of stacks and policies that say where they are."""
        entered = []

        @same
        def enter(module, arguments):
            if module in self._enter:
                self._settle()
                place = self._enter[module]()
                if place is not None:
                    self._path.append(place)
                    entered.append(module)

        @same
        def leave(module, arguments, output):
            if entered and entered[-1] is module:
                self._settle()
                entered.pop()
                self._after |= self._path.pop().part == ATTENTION

        with contextlib.ExitStack() as undo:
            for register, hook in (
                (torch_module.register_module_forward_pre_hook, enter),
                (torch_module.register_module_forward_hook, leave),
            ):
                undo.callback(register(hook).remove)
            for name, stack in self._stacks.items():
                if isinstance(stack, LayerStack):
                    self._wrap(undo, stack, "call", name)
            self._wrap_keys(undo)
            for each in decisions(self._model):
                for method in _METHODS.get(each.policy.kind, ()):
                    self._wrap(undo, each.policy, method, each.name)
            yield

    def _wrap(self, undo, owner, method: str, name: str):
        stock, policy = getattr(owner, method), not isinstance(owner, LayerStack)

        def wrapped(*args, **kwargs):
            if method in ("call", "choose"):
                self._reach(name, args[0])
            depth = owner.depth if isinstance(owner, Reader) else self._depths.get(name)
            with self._at(Place(POLICIES if policy else ATTENTION, name, depth)):
                return stock(*args, **kwargs)

        setattr(owner, method, wrapped)
        undo.callback(delattr, owner, method)

    def _wrap_keys(self, undo):
        """A packed run makes keys and values at depths that no token reaches, too, for a memory."""
        stock, stacks = PackedContext.keys_and_values, {stack: name for name, stack in self._stacks.items()}

        def keys_and_values(context, stack, depth, places, x):
            name = stacks.get(stack)
            if name is None or self._depths.get(name) == depth:
                return stock(context, stack, depth, places, x)
            self._reach(name, depth)
            with self._at(Place(ATTENTION, name, depth)):
                return stock(context, stack, depth, places, x)

        PackedContext.keys_and_values = keys_and_values
        undo.callback(setattr, PackedContext, "keys_and_values", stock)

    def _reach(self, name: str, depth: int):
        self._settle()
        self._depths[name] = depth


@contextlib.contextmanager
def without_policies(model: nn.Module) -> Iterator[nn.Module]:
    """The counterpart of a model: within the ``with`` block it has the same weights, and all its policies are off, so that
    every depth computes every token. What a reader would choose from is not made either. A search stays."""
    kinds = (Reader, InputBank, LearnedBank)
    before = []
    for module in model.modules():
        names = ["router", "halting"] if isinstance(module, LayerStack) else []
        names += [name for name, child in module.named_children() if isinstance(child, kinds)]
        before += [(module, name, getattr(module, name)) for name in names]
    before = [each for each in before if each[2] is not None and not isinstance(each[0], Reader)]
    try:
        for module, name, _ in before:
            setattr(module, name, None)
        yield model
    finally:
        for module, name, policy in before:
            setattr(module, name, policy)


def has_policies(model: nn.Module) -> bool:
    """Whether :func:`without_policies` changes anything."""
    return any(each.policy.kind != "search" for each in decisions(model))


def parameters(model: nn.Module) -> Tuple[int, int]:
    """How many parameters a model has, each counted once; and how many it uses: a layer of a stack counts at every depth,
    a tied embedding wherever it stands."""
    unique = sum(each.numel() for each in model.parameters())
    often = {}
    for name, stack in stacks_of(model).items():
        if isinstance(stack, LayerStack):
            often.update((f"{name}.{number}.", stack.schedule.count(number)) for number in range(stack.unique_layers))
    used = sum(
        each.numel() * next((times for layer, times in often.items() if name.startswith(layer)), 1)
        for name, each in model.named_parameters(remove_duplicate=False)
    )
    return unique, used

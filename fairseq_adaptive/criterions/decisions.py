"""Who decides in a model: routers, halting rules, readers and searches, with the stack that each decides for."""

from typing import Dict, List, NamedTuple, Optional, Tuple

from fairseq.logging import metrics
from torch import Tensor, nn

from fairseq_adaptive.modules import LayerStack, Trace
from fairseq_adaptive.modules.policies import Policy, Reader, Search
from fairseq_adaptive.modules.stack.compute import decided, stack_macs


class Decision(NamedTuple):
    """A policy where it decides.

    Attributes:
        policy: the policy
        name: of the stack, in the model
        stack: the stack
        label: the policy's name, with that of the side in front where several stacks have such a policy
        trace: of a run
        macs: multiply-adds of that run with all policies of the stack, and of its layers without; None where they are
            unknown, and of a search
        reader: of the stack
    """

    policy: Policy
    name: str
    stack: LayerStack
    label: str = ""
    trace: Optional[Trace] = None
    macs: Optional[Tuple[Tensor, Tensor]] = None
    reader: Optional[Reader] = None

    def ran(self, trace: Trace, training: bool) -> "Decision":
        """The decision in a run."""
        macs = None
        if self.policy.kind != "search":
            alive = decided(self.stack, trace) if training else None
            macs = stack_macs(self.stack, trace, alive, self.reader)
        return self._replace(trace=trace, macs=macs)

    @property
    def side(self) -> str:
        """``encoder`` or ``decoder``, also under a wrapper."""
        return self.name.split(".")[-2] if "." in self.name else self.name


def _shared(first: str, second: str) -> int:
    """How many parts two modules' names have in common."""
    pairs = list(zip(first.split("."), second.split(".")))
    return next((place for place, (a, b) in enumerate(pairs) if a != b), len(pairs))


def decisions(model: nn.Module) -> List[Decision]:
    """All policies of a model, by stacks in their order.

    A reader or a search belongs to the stack that is nearest in the model's tree.
    """
    modules = dict(model.named_modules())
    stacks = {name: module for name, module in modules.items() if isinstance(module, LayerStack)}
    found = [
        Decision(policy, name, stack)
        for name, stack in stacks.items()
        for policy in (stack.router, stack.halting)
        if policy is not None
    ]
    for name, module in modules.items():
        if stacks and isinstance(module, (Reader, Search)):
            nearest = max(stacks, key=lambda each: _shared(name, each))
            found.append(Decision(module, nearest, stacks[nearest]))
    names = [_name(each.policy) for each in found]
    readers = {each.stack: each.policy for each in found if each.policy.kind == "reader"}
    return [
        each._replace(label=name if names.count(name) == 1 else f"{each.side}_{name}", reader=readers.get(each.stack))
        for each, name in zip(found, names)
    ]


def spent_on(found: List[Decision], prefix: str) -> Dict[str, Tensor]:
    """Multiply-adds to be logged, of decisions for several stacks: ``spent`` and ``dense``; nothing where unknown."""
    if not found or any(each.macs is None for each in found):
        return {}
    return {f"{prefix}{name}": sum(each) for name, each in zip(("spent", "dense"), zip(*(each.macs for each in found)))}


def log_flops(totals: Dict[str, float], prefix: str, side: str = "") -> None:
    """Log ``flops``, the share of the dense model's, and ``flops_speedup`` of what :func:`spent_on` has summed."""
    dense = totals.get(f"{prefix}dense")
    if dense:
        metrics.log_scalar(f"{side}flops", totals[f"{prefix}spent"] / dense, dense, round=4)
        metrics.log_derived(f"{side}flops_speedup", lambda meters: round(1 / max(meters[f"{side}flops"].avg, 1e-9), 2))


def _name(policy):
    return policy.policy_name or type(policy).__name__.lower()

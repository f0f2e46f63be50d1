"""What a run of the stack did with every token; losses, metrics, reports and pictures read it and nothing else."""

import contextlib
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Dict, Iterator, List, Mapping, Optional, Tuple

import torch
from torch import Tensor, nn


@dataclass
class Step:
    """One depth of a run. Tensors are B x T; what a mechanism does not decide is None.

    Attributes:
        layer: which unique layer ran
        alive: true where the token was computed
        kind: which kind of block ran
        kept: 1 where a router let the token pass and 0 where it did not, with gradient in training
        halted: true where the token stopped after this depth
        probability: what its decision was drawn from: the halting or keeping probability, with gradient in training
        tape: B, how many tape tokens were there; None in a model without a tape. They are the last places of T
        keeping: what a router's choice was drawn from, where a halting rule is there, too
        asked: true where a router was asked
        score: a router's logits, which its price is made of; None where it has none
        said: the number of the word that the token would be here, of a rule that carries ``said``; in training
        counts: a halting rule is asked after this depth, so that it ends an update
    """

    layer: int
    alive: Tensor
    kind: str = "layer"
    kept: Optional[Tensor] = None
    halted: Optional[Tensor] = None
    probability: Optional[Tensor] = None
    tape: Optional[Tensor] = None
    keeping: Optional[Tensor] = None
    asked: Optional[Tensor] = None
    score: Optional[Tensor] = None
    said: Optional[Tensor] = None
    counts: bool = True


def dense_step(stack, context, depth, alive, asked, kept, was_done, done, choice, halting):
    """What a dense run did at a depth; tensors are in the layout of ``context``."""

    def put(each):
        return None if each is None else context.put(each)

    step = Step(stack.schedule[depth], put(alive), getattr(stack[depth], "step_kind", "layer"))
    step.counts = depth in stack.halting_depths
    if choice is not None:
        step.kept, step.asked = put(kept.masked_fill(was_done, 0.0)) * context.tokens, put(asked) & context.tokens
        step.probability = step.keeping = put(choice.probability)
        step.score = put(choice.score)
    if halting is not None:
        step.halted, step.probability = put(alive & done), put(halting)
    return step


@dataclass
class Trace:
    """One run of a stack.

    Attributes:
        tokens: B x T, true at tokens, false at padding, which never counts
        limit: N, how many depths the stack has
        steps: the depths that ran, in order
        remainders: B x T, ACT's remainder (Graves, 2016), 0 at padding and where a token reached the limit
        distribution: U x B x T, PonderNet's probability that a token halts at each depth, with gradient; in training
        reading: what a reader added, or None
        mixture: N x K, of a supernet how probable each kind of each block is, with gradient; or None
        most: U, how many updates a token may take: after how many depths a rule is asked (default: N)
        paths: of a supernet the kind of each block that ran alone, N letters; None: all kinds of all blocks
        tape_room: how many of the last places are those of the tape
        source: B, how many tokens of another sequence these attend to; None: there is none
        memory: of a Transformer-XL, for each depth how many earlier positions were read, and of how many keys and values
            were made anew; or None
        window: how many keys a position of a Transformer-XL sees; None: all
    """

    tokens: Tensor
    limit: int
    steps: List[Step] = field(default_factory=list)
    remainders: Optional[Tensor] = None
    distribution: Optional[Tensor] = None
    reading: Optional[Any] = None
    mixture: Optional[Tensor] = None
    most: Optional[int] = None
    paths: Optional[List[str]] = None
    tape_room: int = 0
    source: Optional[Tensor] = None
    memory: Optional[List[Tuple[int, int]]] = None
    window: Optional[int] = None

    def __post_init__(self):
        self.most = self.limit if self.most is None else self.most

    def extend(self, reading):
        """Tokens have joined, at the end: they were not there at the depths before."""
        live = reading.live
        self.tokens, self.reading = torch.cat((self.tokens, live), 1), reading
        for step in self.steps:
            for name in ("alive", "kept", "halted", "probability", "keeping", "asked", "score"):
                each = getattr(step, name)
                if each is not None:
                    setattr(step, name, torch.cat((each, each.new_zeros(live.shape)), 1))
            step.tape = torch.zeros_like(live.sum(1))

    def present(self, step: Step) -> Tensor:
        """B x T, true at tokens that were there at a depth: those of a tape join on the way."""
        if self.reading is None or step.tape is None or step.tape.any():
            return self.tokens
        return self.tokens & (
            torch.arange(self.tokens.size(1), device=self.tokens.device)
            < self.tokens.size(1) - self.reading.live.size(1)
        )

    def counts(self) -> List[Tensor]:
        """How many tokens there were at each of the N depths, those included that did not run; scalars."""
        found = [self.present(step).sum() for step in self.steps]
        return found + [self.tokens.sum()] * (self.limit - len(found))

    @property
    def tape_len(self) -> Tensor:
        """B, how many tape tokens there were after the last depth that ran."""
        tape = self.steps[-1].tape if self.steps else None
        return torch.zeros_like(self.tokens[:, 0], dtype=torch.long) if tape is None else tape

    @property
    def updates(self) -> Tensor:
        """B x T, at how many depths after which a rule is asked each token was computed; 0 at padding."""
        if self.distribution is not None:  # every depth was computed, to be weighted
            depths = torch.arange(1, self.most + 1, device=self.tokens.device)
            # no matrix product: autocast would round it
            return (self.distribution.detach() * depths[:, None, None]).sum(0) * self.tokens
        nothing = torch.zeros_like(self.tokens, dtype=torch.long)
        return sum((step.alive.long() for step in self.steps if step.counts), nothing)

    def at_limit(self) -> Tensor:
        """How many tokens were still running after the last depth; a scalar."""
        if len(self.steps) < self.limit or self.steps[-1].halted is None:
            return torch.zeros((), device=self.tokens.device)
        return (self.steps[-1].alive & ~self.steps[-1].halted).sum().float()

    def ponder_cost(self) -> Tensor:
        """Sum of n + r over the tokens (Graves, 2016), a scalar; the gradient comes through the remainders."""
        cost = self.updates.sum().float()
        return cost if self.remainders is None else cost + (self.remainders * self.tokens).sum()

    def reluctance(self) -> Tensor:
        """Minus the sum of the logits of p over all updates of all tokens, a scalar. Unlike that of the ponder cost its
        gradient reaches the halting unit also where tokens halt at once (remainder 1) or never (remainder 0)."""
        steps = (step for step in self.steps if step.counts)
        return -sum((step.probability.logit(eps=1e-6) * step.alive).sum() for step in steps)

    def histogram(self) -> Tensor:
        """U, how many tokens took 1 ... U updates; in PonderNet's training as expected."""
        if self.distribution is not None:
            return (self.distribution.detach() * self.tokens).sum((1, 2))
        return torch.bincount(self.updates[self.tokens], minlength=self.most + 1)[1:].float()


class _Traces(list):
    """The traces of a block, which the block around it sees, too."""

    def __init__(self, outer: Optional[List[Trace]]):
        super().__init__()
        self._outer = outer

    def append(self, trace: Trace):
        super().append(trace)
        if self._outer is not None:
            self._outer.append(trace)


# of the stacks whose traces are wanted in this thread, the lists that take them
_WANTED: ContextVar[Mapping[nn.Module, _Traces]] = ContextVar("wanted traces", default=MappingProxyType({}))


def recorder(stack: nn.Module) -> Optional[_Traces]:
    """The list that takes the traces of a stack in this call; None where nobody wants them."""
    return _WANTED.get().get(stack)


@contextlib.contextmanager
def recording(model: nn.Module) -> Iterator[Dict[str, List[Trace]]]:
    """Collect the traces of all runs within the ``with`` block::

        with recording(model) as traces:
            model(**batch)
        traces["encoder.layers"][0].updates  # B x T

    They are those of this thread (or task of asyncio): several may use one model at a time. The model keeps none.

    Yields:
        for every stack its traces, by the module's name
    """
    stacks = {name: module for name, module in model.named_modules() if hasattr(type(module), "recorder")}
    before = _WANTED.get()
    traces = {name: _Traces(before.get(stack)) for name, stack in stacks.items()}
    token = _WANTED.set({**before, **{stack: traces[name] for name, stack in stacks.items()}})
    try:
        yield traces
    finally:
        _WANTED.reset(token)

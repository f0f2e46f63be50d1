"""What a run of a stack costs: multiply-adds of its matrix products, beside those of the same layers on all tokens.

Each layer says by ``macs(work)`` what some :class:`Work` costs it. Norms, activations and what is added are in no count,
as torch's ``FlopCounterMode`` counts none; two FLOPs are one multiply-add. Attention of a causal stack counts whole, too.
"""

import functools
from typing import Dict, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from fairseq_adaptive.modules.policies.base import Counts
from fairseq_adaptive.modules.stack.trace import Trace


class Work(NamedTuple):
    """What one layer did at one depth. Tensors are B, float64, a number for each sequence.

    Attributes:
        computed: tokens that were computed
        tape: how many of them are tape tokens
        made: tokens of which keys and values were made
        read: tokens whose keys each computed one was compared with
        source: tokens of another sequence that each computed one attends to; None: there is none
        source_made: how many of them had their keys and values made at this depth
        memory: positions of earlier segments that are read, too
        memory_made: how many of them had their keys and values made at this depth
        window: how many keys a position sees at most; None: all
        projects: whether the encodings of distances are projected, once a layer
        path: of a supernet's block the kind that ran alone, ``a``, ``f`` or ``i``; None: all kinds
    """

    computed: Tensor
    tape: Tensor
    made: Tensor
    read: Tensor
    source: Optional[Tensor] = None
    source_made: Optional[Tensor] = None
    memory: int = 0
    memory_made: int = 0
    window: Optional[int] = None
    projects: bool = True
    path: Optional[str] = None


class KeysMade:
    """Of which tokens a packed run makes keys and values anew, layer by layer, as
    :class:`~fairseq_adaptive.modules.stack.packed_context.PackedContext` decides it.

    Args:
        stack: the stack
        tokens: B x T
    """

    def __init__(self, stack, tokens: Tensor):
        self._stack, self._made = stack, {}
        self._none = torch.zeros_like(tokens)

    def __call__(self, depth: int, computed: Tensor, seen: Tensor, done: Tensor) -> Tensor:
        """B x T; ``computed``, ``seen`` (by others) and ``done``: B x T, the tokens of which each is true."""
        stack, number = self._stack, self._stack.schedule[depth]
        if not stack.sees_others:
            return computed
        fresh, ever = self._made.get(number, (self._none, self._none))
        fresh = self._none if stack.lora_rank else fresh  # those of another depth are made by other maps
        if stack.kv == "first" and number in self._made:
            made = seen & ~ever
            made = made | computed if made.any() else made
        elif stack.kv == "first":
            made = seen | computed
        else:
            known = fresh | (done & ever) if stack.kv == "keep" else fresh
            made = computed | (seen & ~known)
        self._made[number] = fresh | made, ever | made
        return made

    def changed(self, computed: Tensor):
        """Say which tokens have new states."""
        self._made = {number: (fresh & ~computed, ever) for number, (fresh, ever) in self._made.items()}


def policies_of(stack) -> Tuple:
    """Router and halting rule, each or None."""
    return stack.router, stack.halting


def decided(stack, trace: Trace, move: float = 0.0) -> List[Tensor]:
    """For each depth that ran, B x T, true where evaluation would compute the token; of a training step, too.

    Args:
        move: as if the thresholds of policies that can be moved were, by so much
    """
    parts = [
        policy.decided(trace, move) if policy.movable else policy.decided(trace)
        for policy in policies_of(stack)
        if policy is not None
    ]
    if not parts:
        return [step.alive for step in trace.steps]
    return [functools.reduce(torch.logical_and, each) for each in zip(*parts, strict=True)]


def stack_macs(
    stack, trace: Trace, alive: Optional[List[Tensor]] = None, reader=None
) -> Optional[Tuple[Tensor, Tensor]]:
    """Multiply-adds of a run with its policies, and of the same layers without: at all depths, on all tokens that the
    sequences came with.

    Guan et al. (2022, section 4.1) count the layers alone. Padding costs nothing in either. Where tokens halt or are
    left out, it is the packed run that is counted, with keys and values that it makes for tokens that are seen and not
    computed; a token of the tape costs what its own feed-forward does.

    Args:
        stack: the stack
        trace: of a whole run, not of a step of decoding
        alive: for each depth who is computed, B x T (default: who was)
        reader: the policy that read ``trace.reading``, whose work counts, too

    Returns:
        two scalars, float64; None where a layer does not say what it costs
    """
    if not all(hasattr(stack.layer(number), "macs") for number in range(stack.unique_layers)):
        return None
    tokens, width = trace.tokens, stack[0].embed_dim
    alive = [step.alive for step in trace.steps] if alive is None else alive
    router, rule = policies_of(stack)
    keys, spent = KeysMade(stack, tokens), torch.zeros((), dtype=torch.double, device=tokens.device)
    spent = spent + reading_macs(reader, trace, width)
    # a Transformer-XL masks who is hidden: its distances are those of all places
    whole = stack.sees_others or not stack.adaptive or trace.memory is not None
    going, done, ran = tokens, torch.zeros_like(tokens), set()
    on_tape = torch.arange(tokens.size(1), device=tokens.device) >= tokens.size(1) - trace.tape_room
    expected = None if trace.distribution is None else rule.decided(trace)  # nobody is done in such a training step
    for depth, (step, computed) in enumerate(zip(trace.steps, alive, strict=True)):
        there = trace.present(step)
        if expected is not None:
            done = there & ~expected[depth]
            going = going & ~done
        for policy, asked in ((router, going & there), (rule, computed)):
            if policy is not None and (policy is router or step.counts):
                spent = spent + policy.macs(Counts(asked.sum().double(), 1, width, depth, lengths=asked.sum(1)))
        if stack.adaptive and trace.memory is None and not computed.any():
            made = torch.zeros_like(computed)
        else:
            seen = _seen(stack, there, computed, done)
            made = keys(depth, computed, seen, done) if stack.adaptive else computed
        keys.changed(computed)
        number = depth if stack.lora_rank else stack.schedule[depth]  # whose keys and values of a source are others
        work = Work(
            computed.sum(1).double(),
            (computed & on_tape).sum(1).double(),
            made.sum(1).double(),
            (there if whole else computed).sum(1).double(),
            **_beside(trace, depth, not stack.adaptive or (number not in ran and bool(computed.any()))),
            projects=number not in ran,
        )
        if computed.any():
            ran.add(number)
        spent = spent + stack[depth].macs(work).sum()
        if router is not None and router.monotone:
            going = going & (computed | ~there)
        if step.halted is not None:
            done = done | (computed & step.halted)
            going = going & ~done
    if stack.adaptive and trace.memory is not None:  # a memory is filled at the depths that no token reached, too
        for depth in range(len(trace.steps), len(stack)):
            made = keys(depth, torch.zeros_like(tokens), tokens, done).sum(1).double()
            none = torch.zeros_like(made)
            spent = spent + stack[depth].macs(Work(none, none, made, none, **_beside(trace, depth, True))).sum()
    return spent, dense_macs(stack, trace)


def dense_macs(stack, trace: Trace) -> Tensor:
    """Multiply-adds of the layers at all depths of a stack on the tokens that the sequences came with; a scalar."""
    base = trace.tokens[:, : trace.tokens.size(1) - trace.tape_room].sum(1).double()
    total, ran = 0.0, set()
    for depth, number in enumerate(stack.schedule):
        work = Work(base, base * 0, base, base, **_beside(trace, depth, True), projects=number not in ran)
        total, ran = total + stack[depth].macs(work).sum(), ran | {number}
    return total


def reading_macs(reader, trace: Trace, width: int):
    """What it took to read ``trace.reading``; 0 without one."""
    if reader is None or trace.reading is None:
        return 0.0
    live = trace.reading.live.sum().double()
    return reader.macs(Counts(live, 1, width, reader.depth, trace.reading.size))


def _seen(stack, there, computed, done):
    """B x T, whose keys the others see at a depth."""
    seen = there
    if stack.router is not None and stack.router_kv == "active":
        seen = seen & (computed | done)
    if stack.halting is not None and stack.halting_kv == "active":
        seen = seen & ~done
    return seen


def _beside(trace: Trace, depth: int, first: bool) -> Dict:
    """What a layer reads besides the tokens; ``first``: keys and values of a source are made at this depth."""
    found = {}
    if trace.source is not None:
        source = trace.source.double()
        found.update(source=source, source_made=source if first else source * 0)
    if trace.memory is not None:
        found.update(zip(("memory", "memory_made"), trace.memory[depth]), window=trace.window)
    if trace.paths is not None:
        found["path"] = trace.paths[depth]
    return found

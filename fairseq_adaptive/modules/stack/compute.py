"""What a run of a stack costs: multiplications and additions, beside those of the same layers on all tokens."""

from typing import List, Optional, Tuple

import torch
from torch import Tensor

from fairseq_adaptive.modules.policies.base import Counts
from fairseq_adaptive.modules.stack.trace import Trace


def layer_macs(counts: Tensor, dim: int, ffn_dim: int, seen: Optional[Tensor] = None) -> Tensor:
    """Multiply-adds of a Transformer layer on sequences of ``counts`` (...) tokens: projections, self-attention and
    feed-forward; the attention to another stack's output is not counted.

    Args:
        counts: ..., tokens that are computed
        dim: C
        ffn_dim: inner width of the feed-forward block
        seen: ..., tokens that have keys and values (default: those that are computed)
    """
    counts = counts.double()
    seen = counts if seen is None else seen.double()
    return counts * (2 * dim * dim + 2 * dim * ffn_dim) + seen * 2 * dim * dim + 2 * counts * seen * dim


def _macs(layer, counts: Tensor, seen: Optional[Tensor] = None) -> Tensor:
    """:func:`layer_macs` of a layer, or what it says itself: ``layer.macs(counts, seen)``, all sequences together."""
    if hasattr(layer, "macs"):
        return layer.macs(counts.double(), (counts if seen is None else seen).double()).sum()
    return layer_macs(counts, layer.embed_dim, layer.fc1.out_features, seen).sum()


def stack_macs(stack, trace: Trace, alive: Optional[List[Tensor]] = None) -> Tuple[Tensor, Tensor]:
    """Multiply-adds of a run with its policies, and of the same layers on all tokens without policies.

    Guan et al. (2022, section 4.1) count the layers alone. Padding costs nothing in either.

    Args:
        stack: of layers that have ``embed_dim``, and ``macs`` (blocks of a Transformer-XL, whose memory is not counted) or
            ``fc1`` (Transformer layers)
        trace: of the run
        alive: for each depth who is computed, B x T (default: who was)

    Returns:
        two scalars, float64
    """
    dim, rule, router = stack[0].embed_dim, stack.halting, stack.router
    alive = [step.alive for step in trace.steps] if alive is None else alive
    going, there = trace.tokens, trace.tokens
    spent = dense = torch.zeros((), dtype=torch.double, device=trace.tokens.device)
    for step, computed in zip(trace.steps, alive, strict=True):
        there, layer = trace.present(step), stack.layer(step.layer)
        counts, every = computed.sum(1), there.sum(1)
        for policy, asked in ((router, going & there), (rule, computed)):
            if policy is not None and (policy is router or step.counts):
                spent = spent + policy.macs(Counts(asked.sum().double(), 1, dim))
        spent = spent + _macs(layer, counts, every if stack.sees_others else None)
        dense = dense + _macs(layer, every)
        if router is not None and router.monotone:
            going = going & (computed | ~there)
        if step.halted is not None:
            going = going & ~(computed & step.halted)
    rest = (_macs(stack[depth], there.sum(1)) for depth in range(len(trace.steps), trace.limit))
    return spent, sum(rest, dense)

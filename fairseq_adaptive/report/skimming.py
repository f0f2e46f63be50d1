"""What skimming saves: multiplications and additions of a run, beside those of the model that keeps every token."""

from typing import List, Tuple

import torch
from torch import Tensor

from fairseq_adaptive.modules import Trace


def decided(trace: Trace) -> List[Tensor]:
    """For each depth which tokens the predictors keep when they do not draw, B x T.

    In evaluation this is what was kept. Of a training step, whose decisions are drawn, it is what the same
    probabilities would have kept.
    """
    alive, steps = trace.tokens, []
    for step in trace.steps:
        alive = alive & ((step.probability if step.keeping is None else step.keeping).detach() >= 0.5)
        steps.append(alive)
    return steps


def layer_macs(counts: Tensor, dim: int, ffn_dim: int) -> Tensor:
    """Multiply-adds of a Transformer layer on sequences of ``counts`` (...) tokens: projections and attention."""
    counts = counts.double()
    return counts * (4 * dim * dim + 2 * dim * ffn_dim) + 2 * counts.square() * dim


def predictor_macs(counts: Tensor, dim: int) -> Tensor:
    """Multiply-adds of a skim predictor on ``counts`` (...) tokens."""
    return counts.double() * (dim * dim + 2 * dim)


def skim_macs(trace: Trace, dim: int, ffn_dim: int, alive: List[Tensor]) -> Tuple[Tensor, Tensor]:
    """Multiply-adds of a run with its predictors, and of the same layers on all tokens without predictors (Guan et al.,
    2022, section 4.1, count the layers alone). Padding costs nothing in either.

    Args:
        trace: of the run
        dim: C
        ffn_dim: inner width of the feed-forward blocks
        alive: for each depth what was kept, B x T

    Returns:
        two scalars
    """
    all_tokens = trace.tokens.sum(1)
    entering, spent = all_tokens, torch.zeros((), dtype=torch.double, device=all_tokens.device)
    for kept in alive:
        staying = kept.sum(1)
        spent = spent + (predictor_macs(entering, dim) + layer_macs(staying, dim, ffn_dim)).sum()
        entering = staying
    return spent, trace.limit * layer_macs(all_tokens, dim, ffn_dim).sum()

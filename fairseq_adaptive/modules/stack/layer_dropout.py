"""With which probability each depth is left out of a training step: LayerDrop, and LayerSkip's by depth and time."""

import torch
from torch import Tensor

from fairseq_adaptive.errors import UsageError

BY_DEPTH = ("uniform", "exponential")


def dropout_rates(
    rate: float, depths: int, by_depth: str = "uniform", warmup_updates: int = 0, update: int = 0
) -> Tensor:
    """Return N probabilities.

    ``uniform`` leaves every depth out alike (Fan et al., 2020). ``exponential`` never leaves the first out, and the last
    with the whole rate, so that words are known early: D(l) = 2^(l / (N - 1)) - 1 (Elhoushi et al., *LayerSkip*, 2024;
    from secondary sources). Over the first updates both rise as S(t) = 2^(t / T) - 1.

    >>> dropout_rates(0.2, 3, "exponential").tolist()[::2]
    [0.0, 0.20000000298023224]

    Args:
        rate: p, of the last depth, in [0, 1)
        depths: N
        by_depth: one of :data:`BY_DEPTH`
        warmup_updates: T; 0: S is 1 from the beginning
        update: t

    Raises:
        UsageError: for another ``by_depth``
    """
    if by_depth not in BY_DEPTH:
        raise UsageError(f"unknown --layerdrop-by-depth {by_depth!r}: choose one of {', '.join(BY_DEPTH)}")
    rates = torch.full((depths,), float(rate))
    if by_depth == "exponential":
        rates = rates * (2 ** (torch.arange(depths) / max(depths - 1, 1)) - 1)
    if update < warmup_updates:
        rates = rates * (2 ** (update / warmup_updates) - 1)
    return rates

"""The exit gate of looped language models (Ouro, 2025): PonderNet's distribution over depths with a uniform prior."""

import torch

from fairseq_adaptive.modules.policies.pondernet import PonderNet, prior_divergence
from fairseq_adaptive.modules.policies.registry import register_policy


@register_policy("loop_gate")
class LoopGate(PonderNet):
    """Each depth has a gate l_n, and p_n = l_n prod_{j<n} (1 - l_j), the last l being 1.

    In training all depths are computed, and the loss is the expected one minus weight x entropy of p: no depth is
    preferred, where PonderNet's geometric prior prefers the first. In evaluation a token halts at the first depth where
    the probability to have halted reaches the threshold (the papers' Q-exit, after PALBERT, Balagansky and Gavrilov,
    2022). So one trained model serves every threshold: the higher, the deeper.

    From a secondary source, not checked against the paper. Its second stage, in which the gate alone learns from how much
    a depth improves the loss, is not here.

    Args:
        dim: C, width of the states
        threshold: in (0, 1], the quantile of a token's distribution at which it halts
        bias: of the gate at the start

    Raises:
        UsageError: for a threshold outside (0, 1]
    """

    def __init__(self, dim: int, threshold: float = 0.5, bias: float = -1.0):
        super().__init__(dim, threshold, bias)

    def price(self, trace):
        """The mean over the tokens of ln N - entropy, the divergence from the uniform distribution; 0 in evaluation."""
        if trace.distribution is None:
            return torch.zeros((), device=trace.tokens.device)
        uniform = torch.full((trace.limit,), 1 / trace.limit, dtype=torch.float64, device=trace.distribution.device)
        return (prior_divergence(trace.distribution, uniform) * trace.tokens).sum() / trace.tokens.sum().clamp_min(1)

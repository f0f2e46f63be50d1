"""PonderNet: learning to ponder (Banino et al., 2021)."""

from typing import Optional

import torch
from torch import Tensor

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules.policies.base import Verdict, check_threshold, upcast, where_token
from fairseq_adaptive.modules.policies.quantile import Distributed
from fairseq_adaptive.modules.policies.registry import register_policy


@register_policy("pondernet")
class PonderNet(Distributed):
    """PonderNet (Banino et al., 2021): a distribution over depths, p_n = l_n prod_{j<n} (1 - l_j), the last l being 1.

    In training every token runs through all depths, and the loss is the expectation under p_n. A module whose outputs
    have no loss of their own, a translation encoder, returns the expected state. In evaluation, where the paper
    samples, a token halts at the median of its distribution: at the first depth where the probability to have halted
    reaches the threshold.

    Args:
        dim: C, width of the states
        threshold: in (0, 1], 0.5 is the median; the exit quantile is another name of it
        bias: of the halting unit at the start
        prior_rate: of the geometric prior; 1 over the depth to aim at

    Raises:
        UsageError: for a threshold outside (0, 1], and a rate outside (0, 1)
    """

    weight = 0.01
    unsteered = "whose prior says how deep to go: set --prior-rate to 1 over it"

    def __init__(self, dim: int, threshold: float = 0.5, bias: float = -1.0, prior_rate: float = 0.2):
        super().__init__(dim, bias)
        self.threshold, self.prior_rate = check_threshold(threshold), prior_rate
        truncated_geometric(prior_rate, 1)

    @property
    def weighs_depths(self):
        return self.training

    def start(self, x):
        dtype = upcast(x[..., :0]).dtype
        carry = {"survival": torch.ones(x.shape[:-1], device=x.device, dtype=dtype)}
        if self.training:
            carry["expected"] = torch.zeros_like(x, dtype=dtype)
        return carry

    def step(self, before, after, carry, running, last):
        halting = self.probability(after)
        if last:
            halting = torch.ones_like(halting)
        halting = halting.masked_fill(~running, 0.0)  # who was not computed has no output of this depth
        p = carry["survival"] * halting
        survival = carry["survival"] * (1 - halting)
        state = where_token(running, after, before)
        if self.training:
            expected = carry["expected"] + p.unsqueeze(-1) * state
            return Verdict(state, {"survival": survival, "expected": expected}, running, p)
        stops = running & (1 - survival >= self.threshold)
        return Verdict(state, {"survival": survival}, running & ~stops, p)

    def output(self, state, carry, finished=None):
        if "expected" not in carry:
            return state
        # nothing is left at the last depth, but of padding and of what a router left out there
        return (carry["expected"] + carry["survival"].unsqueeze(-1) * state).to(state.dtype)

    def price(self, trace, prior_rate: Optional[float] = None):
        """The mean over the tokens of the divergence from the prior; 0 in evaluation, where nothing is drawn from it.

        Args:
            prior_rate: in place of the rule's own
        """
        if trace.distribution is None:
            return super().price(trace)
        prior = truncated_geometric(self.prior_rate if prior_rate is None else prior_rate, len(trace.distribution))
        prior = prior.to(trace.distribution.device)
        divergence = prior_divergence(trace.distribution, prior) * trace.tokens
        return divergence.sum() / trace.tokens.sum().clamp_min(1)

    def decided(self, trace):
        if trace.distribution is None:
            return [step.alive for step in trace.steps]
        found, halted = [], 0.0
        for step in trace.steps:
            found.append(step.alive & (torch.as_tensor(halted) < self.threshold))
            if step.counts:
                halted = halted + step.probability.detach()
        return found

    def exit_at(self, quantile):
        self.threshold = check_threshold(quantile, "an exit quantile")

    def at_limit(self, trace):
        """How many tokens reached the last depth, where all halt: in training as expected."""
        if len(trace.steps) < trace.limit:
            return torch.zeros((), device=trace.tokens.device)
        last = trace.steps[-1]
        if trace.distribution is None:
            return last.alive.sum().float()
        return (last.probability.detach() * last.alive).sum()

    def lever(self, trace):
        """None: the prior says how deep to go."""


def truncated_geometric(rate: float, limit: int) -> Tensor:
    """Geometric prior over the depths 1 ... ``limit``, cut off there and renormalised (Banino et al., Section 2.3).

    Args:
        rate: lambda_p, in (0, 1); without the cut its mean is 1 / rate

    Returns:
        ``limit`` probabilities, float64

    Raises:
        UsageError: for a rate outside (0, 1)
    """
    if not 0 < rate < 1:
        raise UsageError(f"a geometric prior of rate {rate} is impossible: it must lie between 0 and 1")
    p = rate * (1 - rate) ** torch.arange(limit, dtype=torch.float64)
    return p / p.sum()


def prior_divergence(distribution: Tensor, prior: Tensor) -> Tensor:
    """KL(p || prior) of every token, the direction of the paper's Equation 2.

    Args:
        distribution: N x ..., sums to 1 over the first dimension
        prior: N

    Returns:
        ...
    """
    log_prior = prior.to(distribution).log().view(-1, *[1] * (distribution.dim() - 1))
    return (torch.xlogy(distribution, distribution.clamp_min(1e-30)) - distribution * log_prior).sum(0)

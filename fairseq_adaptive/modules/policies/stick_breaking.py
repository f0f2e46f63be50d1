"""Stick-breaking halting (Tan et al., *Sparse Universal Transformer*, 2023)."""

import torch

from fairseq_adaptive.modules.policies.base import Verdict, check_threshold, upcast, where_token
from fairseq_adaptive.modules.policies.quantile import Distributed
from fairseq_adaptive.modules.policies.registry import register_policy


@register_policy("stick_breaking")
class StickBreaking(Distributed):
    """A token's result is the mean of its states under p_n = l_n prod_{j<n} (1 - l_j).

    With l_n the halting unit's output of the state after depth n. A token halts when the probability to have halted
    reaches the threshold, in training as in evaluation; what is left of it goes to the state that the token then has. An
    exit quantile is a lower threshold in evaluation alone.

    The authors' gate is a network of two layers that starts at 0; here it is one layer.

    Args:
        dim: C, width of the states
        threshold: in (0, 1]
        bias: of the halting unit at the start

    Raises:
        UsageError: for a threshold outside (0, 1]
    """

    weight, halts_in_training = 0.01, True

    def __init__(self, dim: int, threshold: float = 0.999, bias: float = 0.0):
        super().__init__(dim, bias)
        self.threshold = check_threshold(threshold)

    def start(self, x):
        dtype = upcast(x[..., :0]).dtype
        return {
            "survival": torch.ones(x.shape[:-1], device=x.device, dtype=dtype),
            "output": torch.zeros_like(x, dtype=dtype),
        }

    def step(self, before, after, carry, running, last):
        halting = self.probability(after).masked_fill(~running, 0.0)
        p, survival = carry["survival"] * halting, carry["survival"] * (1 - halting)
        state = where_token(running, after, before)
        output = carry["output"] + p.unsqueeze(-1) * state
        stops = running & (1 - survival >= self.halts_at)
        return Verdict(state, {"survival": survival, "output": output}, running & ~stops, p)

    def output(self, state, carry, finished=None):
        return (carry["output"] + carry["survival"].unsqueeze(-1) * state).to(state.dtype)

    def price(self, trace):
        """The mean over the tokens of the expected depth, sum of n p_n, where what is left of p goes to the last depth
        that the token ran."""
        updates, expected, number = trace.updates, 0.0, torch.zeros_like(trace.tokens, dtype=torch.long)
        for step in (each for each in trace.steps if each.counts):
            number = number + step.alive  # which update of the token this depth is
            expected = expected + (step.probability * step.alive * (number - updates)).sum()
        return (updates.sum() + expected) / trace.tokens.sum().clamp_min(1)

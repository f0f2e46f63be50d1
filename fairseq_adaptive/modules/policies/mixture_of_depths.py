"""Mixture-of-Depths (Raposo et al., 2024): at a depth only the best tokens of each sequence are computed.

As many as there is capacity for; what the layer adds to them is weighted by the router's score. Tokens that are left
out pass by, and may be chosen again at the next depth.
"""

from typing import Union

import torch
import torch.nn.functional as F
from torch import nn

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules.policies.base import Choice, Router
from fairseq_adaptive.modules.policies.ranking import Score, best, bound_of, by_row, count, small_mlp, turned
from fairseq_adaptive.modules.policies.registry import register_policy
from fairseq_adaptive.modules.policies.shift import Shifted


def share_of(capacity: Union[float, str]) -> float:
    """0.125 and "12.5%" -> 0.125.

    Raises:
        UsageError: for a share that is not above 0 and at most 1
    """
    text = str(capacity)
    try:
        share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise UsageError(f'a capacity of {capacity} is impossible: it is a share above 0 and at most 1, or "12.5%"')
    return share


@register_policy("mixture_of_depths")
class MixtureOfDepths(Shifted, Router, nn.ModuleList):
    """One linear layer for each routed depth.

    The best of a sequence are known when all of it is there. Where a choice must not depend on later tokens, in
    evaluation of a decoder, those are computed that have a score of 0 and more (the logit of ``threshold``):
    :meth:`price` teaches the scores, or the predictor's where there is one, to say who is among the best. (Not a sigmoid of
    0.5 and more, which a score just below 0 has, too.)

    The equations are from a secondary source, not checked against the paper: x + r f(x) with r = w x + b for the best, f
    without the outer residual; a capacity of 12.5% at every other depth.

    Args:
        dim: C
        depths: N
        capacity: share of the tokens that is computed, at least one of a sequence; a number up to 1, or "12.5%"
        every: 2: every other depth is routed, the second first, and the others compute all tokens; 1: each is
        weighting: of what the layer adds: ``score``, as in the paper and our presets of it, for pre-LN models; or its
            ``sigmoid``, our own: in a post-LN model states that pass by are not normalised, and such scores square them
        predictor: a small network of its own says who is computed in a decoder's evaluation; it reads the state without a
            gradient, so that learning to say so does not move the scores
        threshold: of the probability to be among the best, above 0 and below 1: whom a decoder computes in evaluation

    Attributes:
        shift: of the capacity's logarithm, where a target has moved it

    Raises:
        UsageError: for values that are impossible
    """

    monotone, weighs, weight, movable = False, True, 0.01, True

    def __init__(
        self,
        dim: int,
        depths: int,
        capacity: Union[float, str] = 0.5,
        every: int = 1,
        weighting: str = "sigmoid",
        predictor: bool = False,
        threshold: float = 0.5,
    ):
        if every not in range(1, depths + 1):
            raise UsageError(
                f"every {every}: of {depths} depths each (1), every other (2) or every {depths}th is routed"
            )
        if weighting not in ("score", "sigmoid"):
            raise UsageError(f"unknown weighting {weighting!r}: choose score or sigmoid")
        super().__init__(Score(dim, 1) for _ in range(depths // every))
        self.capacity, self.every, self.weighting = share_of(capacity), every, weighting
        # beside the units, in whose place a user may put others, such as an adapter of one
        self.predictors = nn.ModuleList(small_mlp(dim) for _ in range(depths // every)) if predictor else None
        self.bound = bound_of(threshold)
        self.register_shift()

    def start(self, x):
        return {"gate": torch.ones_like(x[..., 0])}

    def room(self, counts, by: float = 0.0):
        """How many of ``counts`` tokens of each sequence, B, are computed, the capacity moved ``by`` so much."""
        return (min(1.0, self.shifted(self.capacity, by)) * counts).ceil().clamp_min(1)

    def turn(self, position, causal=False):
        """Set the capacity, in a decoder the threshold."""
        if causal:
            self.bound = bound_of(turned(position))
            return {"router_args": {"threshold": turned(position)}}
        self.capacity, self.shift = max(1e-6, position), None
        return {"router_args": {"capacity": self.capacity}}

    def choose(self, depth, x, carry, asked, sentence, protected, causal):
        if (depth + 1) % self.every:
            ones = x.new_ones(x.shape[:-1])
            return Choice(ones, ones, {"gate": ones})
        unit = self[depth // self.every]
        score = guess = unit(x).squeeze(-1)
        if self.predictors is not None:
            guess = self.predictors[depth // self.every](x.detach()).squeeze(-1)
        if causal and not self.training:
            run = guess >= self.bound
            run = (run if protected is None else run | protected) & asked
        else:
            run = best(score, self.room(count(asked, sentence)), asked, sentence, protected)
        gate = score if self.weighting == "score" else score.sigmoid()
        return Choice(run.to(score), guess.sigmoid(), {"gate": gate}, guess)

    def combine(self, before, after, choice):
        share = choice.run.to(choice.carry["gate"]) * choice.carry["gate"]  # 0 for who passes by
        return before + share.unsqueeze(-1).to(before) * (after - before)

    def price(self, trace):
        """How badly it is told who is among the best: the mean binary cross-entropy over the tokens asked."""
        steps = [step for step in trace.steps if step.score is not None]
        losses = [
            F.binary_cross_entropy_with_logits(step.score, (step.kept > 0).to(step.score), reduction="none")
            * step.asked
            for step in steps
        ]
        asked = sum((step.asked.sum() for step in steps), trace.tokens.new_zeros((), dtype=torch.long))
        return sum((each.sum() for each in losses), super().price(trace)) / asked.clamp_min(1)

    def lever(self, trace):
        """None: no weight of the price changes how much is computed; a target moves the capacity."""

    def decided(self, trace, by: float = 0.0):
        """As :meth:`Policy.decided`; the capacity moved ``by`` so much in its logarithm."""
        if not by:
            return super().decided(trace)
        return [
            step.alive if (depth + 1) % self.every else by_row(step, self.room(step.asked.sum(1), by))
            for depth, step in enumerate(trace.steps)
        ]

    def macs(self, counts):
        """A unit at every routed depth, and a predictor where there is one."""
        if (counts.depth + 1) % self.every:
            return 0.0
        predictor = 0 if self.predictors is None else 2 * counts.dim * (counts.dim + 1)
        return counts.asked * (counts.dim + predictor)

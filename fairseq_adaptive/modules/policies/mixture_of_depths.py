"""Mixture-of-Depths (Raposo et al., 2024): at a depth only the best tokens of each sequence are computed.

As many as there is capacity for; what the layer adds to them is weighted by the router's score. Tokens that are left out
pass by, and may be chosen again at the next depth.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules.known import is_plain
from fairseq_adaptive.modules.packed_linear import LINEARS
from fairseq_adaptive.modules.policies.base import Choice, Router, upcast
from fairseq_adaptive.modules.policies.registry import register_policy


@register_policy("mixture_of_depths")
class MixtureOfDepths(Router, nn.ModuleList):
    """One linear layer for each depth.

    The best of a sequence are known when all of it is there. Where a choice must not depend on later tokens, in
    evaluation of a decoder, those are computed that have a score of 0 and more: :meth:`price` teaches the scores to say
    who is among the best. (Not a sigmoid of 0.5 and more, which a score just below 0 has, too.)

    Args:
        dim: C
        depths: N
        capacity: share of the tokens that is computed, at least one of a sequence

    Raises:
        UsageError: for a capacity that is not above 0 and at most 1
    """

    monotone, weighs = False, True

    def __init__(self, dim: int, depths: int, capacity: float = 0.5):
        if not 0 < capacity <= 1:
            raise UsageError(f"a capacity of {capacity} is impossible: it is a share above 0 and at most 1")
        super().__init__(nn.Linear(dim, 1) for _ in range(depths))
        self.capacity = capacity

    def choose(self, depth, x, carry, asked, sentence, protected, causal):
        scores = self._scores(depth, x)
        if causal and not self.training:
            run = scores >= 0
            run = (run if protected is None else run | protected) & asked
        else:
            run = self._best(scores.detach().double(), asked, sentence, protected)
        return Choice(run.to(scores), scores.sigmoid())

    def _scores(self, depth, x):
        if not is_plain(self[depth], LINEARS):
            return upcast(self[depth](x).squeeze(-1))
        with torch.autocast(x.device.type, enabled=False):  # half precision makes ties of near scores
            x, unit = upcast(x), self[depth]
            return F.linear(x, unit.weight.to(x.dtype), unit.bias.to(x.dtype)).squeeze(-1)

    def _best(self, key: Tensor, asked: Tensor, sentence: Tensor, protected) -> Tensor:
        """..., true at the best of each sequence."""
        shape, sentence, asked = key.shape, sentence.flatten(), asked.flatten()
        key = key.flatten().masked_fill(~asked, -torch.inf)
        if protected is not None:
            key = key.masked_fill(protected.flatten() & asked, torch.inf)
        batch = int(sentence.max()) + 1 if sentence.numel() else 0
        order = key.argsort(descending=True, stable=True)
        order = order[sentence[order].argsort(stable=True)]  # by sequence, the best first
        counts, there = sentence.bincount(minlength=batch), sentence[asked].bincount(minlength=batch)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=key.device)
        place = place - (counts.cumsum(0) - counts)[sentence]
        room = (self.capacity * there).ceil().clamp_min(1).long()
        return ((place < room[sentence]) & asked).view(shape)

    def combine(self, before, after, choice):
        share = choice.run.to(choice.probability) * choice.probability  # 0 for who passes by
        return before + share.unsqueeze(-1).to(before) * (after - before)

    def price(self, trace):
        """How badly the scores say who is among the best: the mean binary cross-entropy over the tokens asked."""
        losses = [F.binary_cross_entropy(step.keeping, (step.kept > 0).to(step.keeping), reduction="none") * step.asked
                  for step in trace.steps]
        asked = sum(step.asked.sum() for step in trace.steps)
        return sum(each.sum() for each in losses) / asked.clamp_min(1)

    def macs(self, counts):
        return counts.asked * counts.dim

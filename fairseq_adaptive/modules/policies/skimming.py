"""Which tokens go on: Guan et al., *Transkimmer: Transformer Learns to Layer-wise Skim* (ACL 2022).

Before each layer a predictor keeps or skims each token. A skimmed token stays skimmed, and its output is the state that
it had. Attention leaves skimmed tokens out, as if they were not there.
"""

import math

import torch
from torch import nn

from fairseq_adaptive.modules.layers.native_layer import native_scores
from fairseq_adaptive.modules.layers.prepacked_linear import PrepackedLinear
from fairseq_adaptive.modules.policies.base import Choice, Router
from fairseq_adaptive.modules.policies.registry import register_policy
from fairseq_adaptive.modules.policies.shift import FARTHEST, Shifted

KEEP = 1  # the column of the predictor's output that means keep; 0 means skim


class SkimPredictor(nn.Sequential):
    """LayerNorm, Linear, LayerNorm, GELU, Linear (section 3.2), with the weight names of the published checkpoints.

    Args:
        dim: C, width of the states
        bias: keep and skip scores begin at it and at its negative
    """

    def __init__(self, dim: int, bias: float = 5.0):
        hidden = PrepackedLinear(dim, dim)
        super().__init__(nn.LayerNorm(dim), hidden, nn.LayerNorm(dim), nn.GELU(), nn.Linear(dim, 2))
        self.bias = bias
        self.reset_parameters()

    def forward(self, x):
        """... x C -> ... x 2"""
        scores = native_scores(self, x)
        return super().forward(x) if scores is None else scores

    def reset_parameters(self):
        """As published: with a bias of 5 nearly every token is kept at first."""
        nn.init.normal_(self[1].weight, std=0.02)
        nn.init.zeros_(self[1].bias)
        nn.init.normal_(self[4].weight, std=0.02)
        nn.init.normal_(self[4].bias[KEEP : KEEP + 1], self.bias, 0.02)
        nn.init.normal_(self[4].bias[1 - KEEP : 2 - KEEP], -self.bias, 0.02)


@register_policy("skimming")
class Skimming(Shifted, Router, nn.ModuleList):
    """A predictor for each of the N depths of a stack, also where a layer serves several.

    Args:
        dim: C, width of the states
        depths: N
        bias: as of :class:`SkimPredictor`
        noise: how much of the Gumbel noise decides in training, from 0 to 1; 0: training decides as evaluation does

    Attributes:
        shift: is added to all scores of keeping: where a controller has moved the threshold; None: it has not
    """

    weight, movable = 0.5, True

    def __init__(self, dim: int, depths: int, bias: float = 5.0, noise: float = 1.0):
        super().__init__(SkimPredictor(dim, bias) for _ in range(depths))
        self.noise = noise
        self.register_shift()

    @property
    def hidden_maps(self):
        """The large linear maps of the predictors, C x C; what scores is not among them."""
        return [predictor[1] for predictor in self]

    def turn(self, position, causal=False):
        """Set the threshold, which is saved with the weights."""
        self.set_shift(FARTHEST * (2 * position - 1))
        return {}

    def reset_parameters(self):
        for predictor in self:
            predictor.reset_parameters()

    def choose(self, depth, x, carry, asked, sentence, protected, causal):
        """In training a decision is drawn, a hard Gumbel-softmax of temperature 1 with the gradient of the soft one
        (section 3.3); less noise than all of it is our own. In evaluation it is that of the greater score. A choice
        depends on the token alone."""
        scores = self[depth](x)
        scores = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
        if self.shift is not None:
            scores = torch.stack((scores[..., 1 - KEEP], scores[..., KEEP] + self.shift.to(scores)), -1)
        if self.training:
            noise = -self.noise * torch.empty_like(scores).exponential_().log()
            soft = (scores + noise).softmax(-1)[..., KEEP]
            kept = (soft >= 0.5).to(soft) - soft.detach() + soft
        else:
            kept = (scores[..., KEEP] >= scores[..., 1 - KEEP]).to(scores)
        probability = scores.softmax(-1)[..., KEEP]
        if protected is not None:
            kept, probability = kept.masked_fill(protected, 1.0), probability.masked_fill(protected, 1.0)
        return Choice(kept, probability)

    def price(self, trace):
        """The share of kept tokens among those that there were, over all layers (section 3.4)."""
        return sum(step.kept.sum() for step in trace.steps) / sum(trace.counts()).clamp_min(1)

    def decided(self, trace, by: float = 0.0):
        """Decisions of a training step are drawn: these are what the same probabilities would decide, the threshold moved
        ``by`` so much."""
        alive, found, least = trace.tokens, [], 1 / (1 + math.exp(by))
        for step in trace.steps:
            there = trace.present(step)
            alive = alive & ((step.keeping.detach() >= least) | ~there)
            found.append(alive & there)
            alive = alive if step.halted is None else alive & ~step.halted
        return found

    def macs(self, counts):
        return counts.asked * counts.dim * (counts.dim + 2)

"""Which tokens go on: Guan et al., *Transkimmer: Transformer Learns to Layer-wise Skim* (ACL 2022).

Before each layer a predictor keeps or skims each token. A skimmed token stays skimmed, and its output is the state that
it had. Attention leaves skimmed tokens out, as if they were not there.
"""

from typing import Optional, Tuple

import torch
from torch import Tensor, nn

from fairseq_adaptive.ops.skim_attention import Sequences, skim_attention

KEEP = 1  # the column of the predictor's output that means keep; 0 means skim


class SkimPredictor(nn.Sequential):
    """LayerNorm, Linear, LayerNorm, GELU, Linear (section 3.2), with the weight names of the published checkpoints.

    Args:
        dim: C, width of the states
        bias: keep and skip scores begin at it and at its negative
    """

    def __init__(self, dim: int, bias: float = 5.0):
        super().__init__(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.LayerNorm(dim), nn.GELU(), nn.Linear(dim, 2))
        self.bias = bias
        self.reset_parameters()

    def reset_parameters(self):
        """As published: with a bias of 5 nearly every token is kept at first."""
        nn.init.normal_(self[1].weight, std=0.02)
        nn.init.zeros_(self[1].bias)
        nn.init.normal_(self[4].weight, std=0.02)
        nn.init.normal_(self[4].bias[KEEP : KEEP + 1], self.bias, 0.02)
        nn.init.normal_(self[4].bias[1 - KEEP : 2 - KEEP], -self.bias, 0.02)


class SkimRouter(nn.ModuleList):
    """A predictor for each of the N depths of a stack, also where a layer serves several.

    Args:
        dim: C, width of the states
        depths: N
        bias: as of :class:`SkimPredictor`
        noise: how much of the Gumbel noise decides in training, from 0 to 1; 0: training decides as evaluation does
    """

    def __init__(self, dim: int, depths: int, bias: float = 5.0, noise: float = 1.0):
        super().__init__(SkimPredictor(dim, bias) for _ in range(depths))
        self.noise = noise

    def reset_parameters(self):
        for predictor in self:
            predictor.reset_parameters()

    def decide(
        self, depth: int, x: Tensor, protected: Optional[Tensor] = None, need_probability: bool = True
    ) -> Tuple[Tensor, Optional[Tensor]]:
        """Say which tokens go on.

        In training a decision is drawn, a hard Gumbel-softmax of temperature 1 with the gradient of the soft one
        (section 3.3); less noise than all of it is our own. In evaluation it is that of the greater score.

        Args:
            depth: before which depth
            x: ... x C, states
            protected: ..., true at tokens that must not be skimmed
            need_probability: return more than None in its place

        Returns:
            ..., 1 where a token is kept and 0 where it is skimmed, and the probability that it is kept
        """
        scores = self[depth](x)
        scores = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
        if self.training:
            noise = -self.noise * torch.empty_like(scores).exponential_().log()
            soft = (scores + noise).softmax(-1)[..., KEEP]
            kept = (soft >= 0.5).to(soft) - soft.detach() + soft
        else:
            kept = (scores[..., KEEP] >= scores[..., 1 - KEEP]).to(scores)
        probability = scores.softmax(-1)[..., KEEP] if need_probability else None
        if protected is not None:
            kept = kept.masked_fill(protected, 1.0)
            probability = None if probability is None else probability.masked_fill(protected, 1.0)
        return kept, probability


def attend(attention, sequences: Sequences, x: Tensor, kept: Optional[Tensor] = None) -> Tensor:
    """Self-attention of packed rows that leaves skimmed tokens out, differentiable in ``kept``.

    Args:
        attention: fairseq's multi-head attention
        sequences: which rows are a sequence
        x: R x C
        kept: R, 1 where a token is kept and 0 where it is skimmed; None: all are kept

    Returns:
        R x C
    """
    heads = (attention.num_heads, attention.head_dim)
    parts = (project(x).unflatten(-1, heads) for project in (attention.q_proj, attention.k_proj, attention.v_proj))
    dropout = attention.dropout_module.p if attention.training else 0.0
    return attention.out_proj(skim_attention(*parts, sequences, kept, dropout).flatten(1))

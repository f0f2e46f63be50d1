"""Which tokens go on: Guan et al., *Transkimmer: Transformer Learns to Layer-wise Skim* (ACL 2022).

Before each layer a predictor keeps or skims each token. A skimmed token stays skimmed, and its output is the state that
it had. Attention leaves skimmed tokens out, as if they were not there.
"""

from typing import Iterator, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq_adaptive.modules.packing import Groups

KEEP = 1  # the column of the predictor's output that means keep; 0 means skim
STEEPEST = 10.0  # a skimmed key may promise the mask's gradient at most e^10 times what the strongest kept key has


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
    """

    def __init__(self, dim: int, depths: int, bias: float = 5.0):
        super().__init__(SkimPredictor(dim, bias) for _ in range(depths))

    def reset_parameters(self):
        for predictor in self:
            predictor.reset_parameters()

    def decide(
        self, depth: int, x: Tensor, protected: Optional[Tensor] = None, need_probability: bool = True
    ) -> Tuple[Tensor, Optional[Tensor]]:
        """Say which tokens go on.

        In training a decision is drawn, a hard Gumbel-softmax of temperature 1 with the gradient of the soft one
        (section 3.3). In evaluation it is that of the greater score.

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
            kept = F.gumbel_softmax(scores, tau=1.0, hard=True)[..., KEEP]
        else:
            kept = (scores[..., KEEP] >= scores[..., 1 - KEEP]).to(scores)
        probability = scores.softmax(-1)[..., KEEP] if need_probability else None
        if protected is not None:
            kept = kept.masked_fill(protected, 1.0)
            probability = None if probability is None else probability.masked_fill(protected, 1.0)
        return kept, probability


def masked_softmax(scores: Tensor, kept: Tensor) -> Tensor:
    """Softmax over the kept keys, differentiable in ``kept``.

    Equal to leaving skimmed keys out where ``kept`` is 0 or 1, but a skimmed key still tells the mask what it would
    have contributed. A skimmed query sees itself, so that no row is empty. The form is that of Rao et al., *DynamicViT*
    (NeurIPS 2021), equation 11, without its epsilon: the maximum is taken over the keys that are seen, which keeps
    the sum at 1 or above and the result exact.

    Args:
        scores: B x H x T x T
        kept: B x T, from 0 to 1, 0 at padding

    Returns:
        B x H x T x T in at least single precision
    """
    scores = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
    keys = kept[:, None, None].to(scores)
    keys = keys + (1 - keys) * torch.eye(scores.size(-1), dtype=scores.dtype, device=scores.device)
    highest = scores.detach().masked_fill(keys == 0, float("-inf")).amax(-1, keepdim=True)
    exponentials = (scores - highest).clamp(max=STEEPEST).exp() * keys
    return exponentials / exponentials.sum(-1, keepdim=True)


def masked_attention(attention, groups: Groups, kept: Tensor, x: Tensor) -> Tensor:
    """Self-attention that leaves skimmed tokens out, differentiable in ``kept``.

    Args:
        attention: fairseq's multi-head attention
        groups: which rows are a sequence
        kept: R, see :func:`masked_softmax`
        x: R x C

    Returns:
        R x C
    """
    queries, keys, values = split_heads(attention, groups, x)
    weights = masked_softmax(queries @ keys.transpose(2, 3) * attention.scaling, groups.pad(kept))
    out = attention.dropout_module(weights).to(values) @ values
    return attention.out_proj(groups.unpad(out.transpose(1, 2).flatten(2)))


def split_heads(attention, groups: Groups, x: Tensor) -> Iterator[Tensor]:
    """R x C to queries, keys and values, each G x H x Q x D."""
    for project in (attention.q_proj, attention.k_proj, attention.v_proj):
        yield groups.pad(project(x)).unflatten(-1, (attention.num_heads, attention.head_dim)).transpose(1, 2)

"""The definition of a residual branch with its layer norm; torch runs it as it stands."""

from typing import Tuple

import torch.nn.functional as F
from torch import Tensor


def residual_norm(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, dropout: float = 0.0
) -> Tuple[Tensor, Tensor]:
    """Return (total, normalized), both ... x C: ``x + dropout(branch)`` and its layer norm.

    A post-LN sublayer goes on with the second (Vaswani et al., 2017), a pre-LN one with both: the next sublayer reads
    the second and adds to the first.

    Args:
        x, branch: ... x C
        weight, bias: C, of the layer norm
        eps: added to the variance
        dropout: probability that an element of the branch is left out; the others are scaled by 1 / (1 - dropout)
    """
    total = x + F.dropout(branch, dropout)
    return total, F.layer_norm(total, weight.shape, weight, bias, eps)

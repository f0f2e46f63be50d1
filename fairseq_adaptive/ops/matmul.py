"""Matrix products without a graph, on the faster of torch's two libraries."""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

LEAST = 2**24  # multiplications; below, a call of oneDNN costs as much as it saves
_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None)

if _LINEAR is not None:

    @register_flop_formula(_LINEAR)
    def _flops(x_shape, weight_shape, *args, **kwargs):
        return 2 * torch.Size(x_shape).numel() * weight_shape[0]


def linear(x: Tensor, weight: Tensor, bias: Optional[Tensor] = None) -> Tensor:
    """Return ``x weight^T + bias``, ``[N, O]``, without a gradient.

    On a CPU torch multiplies float32 matrices with MKL, which takes about twice as long as oneDNN on processors not of
    Intel's make.

    Args:
        x: ``[N, I]``
        weight: ``[O, I]``
        bias: ``[O]`` or None
    """
    onednn = (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() * len(weight) >= LEAST
        and _LINEAR is not None
        and torch.backends.mkldnn.enabled
        and torch.backends.mkldnn.is_available()
    )
    return _LINEAR(x, weight, bias, "none", [], "") if onednn else F.linear(x, weight, bias)

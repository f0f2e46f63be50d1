"""Transformer-XL's attention with relative positions, whose weights are never all in memory."""

from typing import Optional

import torch
from torch import Tensor

from fairseq_adaptive.ops.registry import Op
from fairseq_adaptive.ops.relative_attention import naive

OP = Op("relative_attention", {"triton": f"{__name__}.triton:attend", "torch": f"{__name__}.eager:attend"})


def relative_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    distances: Tensor,
    content_bias: Tensor,
    position_bias: Tensor,
    window: Optional[int] = None,
    dropout: float = 0.0,
) -> Tensor:
    """As ``naive.py`` defines it, ``[H, B, T, D]`` in the dtype of ``queries``, with gradients of the first order.

    The backward pass computes the weights again, and draws the same dropout again: nothing of the size T x K is kept.
    """
    operands = queries, *(each.to(queries.dtype) for each in (keys, values, distances)), content_bias, position_bias
    attend, device = OP.implementation(queries, queries.dtype), queries.device.type
    if torch.jit.is_tracing():  # torch.onnx.export(dynamo=False) loses what is written into parts of a tensor
        attend = naive.relative_attention
    if not torch.is_autocast_enabled(device):
        return attend(*operands, window, dropout)
    with torch.autocast(device, enabled=False):
        return attend(*operands, window, dropout)

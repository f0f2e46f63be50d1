"""A linear map with weights and inputs of int8, for inference on a CPU."""

from typing import Optional

import torch
from torch import Tensor

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.ops.registry import Op

__all__ = ["OP", "int8_weights"]
OP = Op("int8_linear", {"torch": f"{__name__}.eager:Int8Weights"}, (torch.float32,))


def int8_weights(weight: Tensor, bias: Optional[Tensor] = None):
    """Return what maps ``[..., I]`` to ``[..., O]`` as ``naive.py`` defines, to the rounding of float32; W is copied.

    Args:
        weight: ``[O, I]``
        bias: ``[O]`` or None

    Raises:
        UsageError: for weights of another type or on another device, and where this processor or torch has no product of
            int8 that is right
    """
    if weight.device.type != "cpu":
        raise UsageError(f"int8 runs on a CPU, and this model is on {weight.device}: use --cpu, or leave int8 out")
    if weight.dtype != torch.float32:
        raise UsageError(f"int8 is made of float32, and these weights are {weight.dtype}: leave out --fp16 or int8")
    return OP.implementation(weight, weight.dtype)(weight, bias)

"""A linear map with weights and inputs of int8, for inference on a CPU."""

import functools
import os
from typing import Optional, Type

import torch
from torch import Tensor

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.ops.int8_linear.eager import Int8Weights
from fairseq_adaptive.ops.matmul import stands_for_others
from fairseq_adaptive.ops.registry import VARIABLE, Op

__all__ = ["OP", "int8_weights", "kind"]
OP = Op(
    "int8_linear",
    {"native": f"{__name__}.native:NativeWeights", "torch": f"{__name__}.eager:Int8Weights"},
    (torch.float32,),
)


@functools.lru_cache(maxsize=4096)
def _kind(asked, outer, inner, rows, threads):
    if OP.choose("cpu", torch.float32)[0] == "native":
        from fairseq_adaptive.ops.encoder_layer.native import slower, small_obstacle

        if small_obstacle(outer, inner) is None and (
            asked == "native" or not slower(inner, outer, rows, threads, small=True)
        ):
            return OP.implementation(torch.zeros(1), torch.float32)
    return Int8Weights


def kind(x: Tensor, weight: Tensor) -> Type:
    """Return the class of the weights to take for an input: those of C where these can run, are not slower, and nothing
    watches torch's operations.

    Args:
        x: ``[..., I]``
        weight: ``[O, I]``
    """
    if (
        x.dtype != torch.float32
        or not x.is_cpu
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or stands_for_others(x)
    ):
        return Int8Weights
    rows = x.numel() // max(1, x.size(-1))
    return _kind(os.environ.get(VARIABLE), *weight.shape, rows, torch.get_num_threads())


def int8_weights(weight: Tensor, bias: Optional[Tensor] = None, kind: Optional[Type] = None):
    """Return what maps ``[..., I]`` to ``[..., O]`` as ``naive.py`` defines, to the rounding of float32; W is copied.

    Args:
        weight: ``[O, I]``
        bias: ``[O]`` or None
        kind: of :func:`kind`; None: torch's

    Raises:
        UsageError: for weights of another type or on another device
    """
    if weight.device.type != "cpu":
        raise UsageError(f"int8 runs on a CPU, and this model is on {weight.device}: use --cpu, or leave int8 out")
    if weight.dtype != torch.float32:
        raise UsageError(f"int8 is made of float32, and these weights are {weight.dtype}: leave out --fp16 or int8")
    return (kind or Int8Weights)(weight, bias)

"""Linear layers on a CPU: products of oneDNN, for inference with weights laid out once for all products to come."""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq_adaptive.ops import matmul


class PackedWeights:
    """``x W^T + b`` for one W and many x without gradients.

    torch multiplies float32 matrices with MKL, which is slow on processors not of Intel's make; oneDNN is not, and is
    faster again where W comes in its own layout. Small products, other types and devices take torch's way.

    Args:
        weight: O x I
        bias: O
    """

    def __init__(self, weight: Tensor, bias: Optional[Tensor] = None):
        self.weight, self.bias, self._packed = weight, bias, None
        packable = weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.enabled
        packable &= torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        self._least = matmul.LEAST / weight.size(0) if packable else float("inf")

    def __call__(self, x: Tensor) -> Tensor:
        """... x I -> ... x O"""
        if x.numel() < self._least or torch.is_autocast_enabled("cpu"):
            return F.linear(x, self.weight, self.bias)
        if self._packed is None:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), None)
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")


class PackedLinear(nn.Linear):
    """:class:`torch.nn.Linear` that keeps :class:`PackedWeights`: same parameters, same names, same results."""

    _kept = None

    @classmethod
    def adopt(cls, module: nn.Module):
        """Make every plain ``nn.Linear`` in ``module`` a packed one; parameters stay where they are."""
        for each in module.modules():
            if type(each) is nn.Linear:
                each.__class__ = cls

    def packed(self) -> PackedWeights:
        """The weights as they are now: a checkpoint may have been loaded, or the model moved."""
        weight, bias = self.weight, self.bias
        state = weight.data_ptr(), weight._version, weight.dtype, None if bias is None else bias.data_ptr()
        if self._kept is None or self._kept[0] != state:
            self._kept = state, PackedWeights(weight, bias)
        return self._kept[1]

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return matmul.linear(x, self.weight, self.bias)
        if x.numel() * self.out_features < matmul.LEAST:  # as packed weights do, without a look at them
            return F.linear(x, self.weight, self.bias)
        return self.packed()(x)

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "_kept"}

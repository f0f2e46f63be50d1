"""``naive.py`` in C: rounding, product and bias of a map in one call."""

from ctypes import byref
from typing import Optional

from torch import Tensor

from fairseq_adaptive.ops.encoder_layer import native


def obstacle() -> Optional[str]:
    """Why there are no such products, in words, or None."""
    return native.obstacle()


class NativeWeights:
    """As :class:`~fairseq_adaptive.ops.int8_linear.eager.Int8Weights`, for weights of whole vectors."""

    def __init__(self, weight: Tensor, bias: Optional[Tensor] = None):
        self._packing = native.Packing(native.library())
        self._map, self._outputs = self._packing.small_map(weight, bias), len(weight)

    def __call__(self, x: Tensor) -> Tensor:
        """``[..., I]`` to ``[..., O]``."""
        rows = x.reshape(-1, x.size(-1)).contiguous()
        y = rows.new_empty(len(rows), self._outputs)
        self._packing.library.linear(byref(self._map), rows.data_ptr(), len(rows), y.data_ptr())
        return y.view(*x.shape[:-1], self._outputs)

"""Linear maps of int8 by torch's own products of integers: oneDNN's, else fbgemm's, else of float64.

oneDNN makes a primitive for every number of rows that it has not seen: rows are computed in parts of at most
:data:`PART`, whose numbers are rounded up.
"""

import contextlib
import functools
import warnings
from typing import List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

from fairseq_adaptive.ops.int8_linear.naive import LEVELS, limits, round_weight

PART = 256  # rows that are computed at a time: what they need stays in the cache
WIDEST = 2**31 // (255 * 127)  # inputs of a map whose sums fit into 32 bits


class OneDNN:
    """``scale (q . v)`` by :func:`torch.ops.onednn.qlinear_pointwise`."""

    name = "torch.ops.onednn.qlinear_pointwise"

    def __init__(self, v: Tensor, scale: Tensor):
        self._packed = torch.ops.onednn.qlinear_prepack(v, None)
        self._scale, self._zeros = scale, torch.zeros(len(v), dtype=torch.long)

    @staticmethod
    def there() -> bool:
        names = "qlinear_prepack", "qlinear_pointwise"
        return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.onednn, name) for name in names)

    def __call__(self, q: Tensor, out: Tensor):
        """Add the product of uint8 ``[R, I]`` to float32 ``[R, O]``, in place."""
        # int8 inputs, which need no low, have no fast kernel on processors without AMX
        where = (q, 1.0, 0, self._packed, self._scale, self._zeros, out, None)
        torch.ops.onednn.qlinear_pointwise.binary(*where, 1.0, 0, torch.float32, 1.0, 0, "sum", 1.0, "none", [], "")


class FBGEMM:
    """``scale (q . v)`` by :func:`torch.ops.quantized.linear_dynamic`, which finds the range of its input itself: with a
    row more that holds 0 and 255 its integers are those of q."""

    name = "torch.ops.quantized.linear_dynamic"

    def __init__(self, v: Tensor, scale: Tensor):
        zeros = torch.zeros(len(v), dtype=torch.long)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # deprecated; where it is gone, this way is not there
            whole = torch._make_per_channel_quantized_tensor(v, scale.double(), zeros, 0)
        self._packed = torch.ops.quantized.linear_prepack(whole, None)

    @staticmethod
    def there() -> bool:
        names = "linear_prepack", "linear_dynamic"
        return (
            "fbgemm" in torch.backends.quantized.supported_engines
            and all(hasattr(torch.ops.quantized, name) for name in names)
            and hasattr(torch, "_make_per_channel_quantized_tensor")
        )

    def __call__(self, q: Tensor, out: Tensor):
        x = q.new_zeros(len(q) + 1, q.size(1), dtype=torch.float32)
        x[:-1], x[-1, 0] = q, LEVELS
        out.add_(torch.ops.quantized.linear_dynamic(x, self._packed)[:-1])


class Doubles:
    """The same by numbers of float64, whose sums are exact: right on any processor, and no faster than a map of float32."""

    name = "torch's products of float64, since those of int8 are not there or not right on this processor"

    def __init__(self, v: Tensor, scale: Tensor):
        self._weight, self._scale = v.double().t(), scale

    @staticmethod
    def there() -> bool:
        return True

    def __call__(self, q: Tensor, out: Tensor):
        out.add_((q.double() @ self._weight).float().mul_(self._scale))


WAYS = (OneDNN, FBGEMM, Doubles)
if hasattr(torch.ops.onednn, "qlinear_pointwise") and torch.ops.onednn.qlinear_pointwise not in flop_registry:

    @register_flop_formula(torch.ops.onednn.qlinear_pointwise)
    def _flops(x_shape, x_scale, x_zero, weight_shape, *args, out_shape=None, **kwargs):
        return 2 * torch.Size(x_shape).numel() * out_shape[-1]


def _right(way) -> bool:
    """Whether a product is right at its largest numbers, where processors without VNNI cut sums to 16 bits."""
    generator = torch.Generator().manual_seed(1)
    q = torch.randint(0, LEVELS + 1, (8, 64), generator=generator, dtype=torch.uint8)
    v = torch.randint(-127, 128, (32, 64), generator=generator, dtype=torch.int8)
    q[0], q[1], v[0], v[1] = LEVELS, 0, 127, -127
    scale = torch.linspace(0.01, 1, len(v))
    expected, found = (q.double() @ v.double().t()) * scale.double(), torch.ones(len(q), len(v))
    way(v, scale)(q, found)
    return bool(torch.allclose(found.double(), expected + 1, rtol=1e-6, atol=1e-6))


@functools.cache
def way():
    """The class of the products that run here: the first that is there, and right. Without VNNI those of int8 may cut off
    large sums."""
    for each in WAYS[:-1]:
        with contextlib.suppress(RuntimeError):
            if each.there() and _right(each):
                return each
    return WAYS[-1]


def rounded_up(rows: int) -> int:
    """How many rows are computed where there are so many."""
    step = 8 if rows <= 64 else 16 if rows <= 256 else 64
    return -(-rows // step) * step


class RoundedInput(NamedTuple):
    """What several maps read.

    Attributes:
        shape: of the input but for the last dimension
        parts: q of some rows, uint8 ``[rounded_up(R), I]``, their step and ``low / step``, ``[R, 1]``
    """

    shape: torch.Size
    parts: List[Tuple[Tensor, Tensor, Tensor]]


def round_input(x: Tensor) -> RoundedInput:
    """Return ``[..., I]`` as integers, to the same as ``naive.round_rows``."""
    rows, parts = x.reshape(-1, x.size(-1)), []
    for first in range(0, len(rows), PART):
        some = rows[first : first + PART]
        count = len(some)
        low, step = limits(some)
        q = some.new_empty(rounded_up(count), some.size(1), dtype=torch.uint8)
        q[count:] = 0
        # cut off, so rounded; torch's way from float32 to uint8 takes three times as long as by int32
        q[:count] = (some - low).mul_(step.reciprocal()).add_(0.5).to(torch.int32)
        parts.append((q, step, low / step))
    return RoundedInput(x.shape[:-1], parts)


class Int8Weights:
    """A linear map for many x without gradients; a copy of W.

    Args:
        weight: float32 ``[O, I]`` on a CPU
        bias: ``[O]`` or None
    """

    def __init__(self, weight: Tensor, bias: Optional[Tensor] = None):
        v, scale = round_weight(weight.detach())
        self._product, self._outputs = way()(v, scale), len(v)
        self._sums = scale * v.sum(1)  # of the weights as they are now
        self._bias = None if bias is None else bias.detach().clone()

    def __call__(self, x) -> Tensor:
        """``[..., I]``, or what :func:`round_input` made of it, to ``[..., O]``."""
        shape, parts = x if isinstance(x, RoundedInput) else round_input(x)
        rows = shape.numel()
        y = self._sums.new_empty(sum(len(q) for q, *_ in parts), self._outputs)
        y[rows:] = 0
        for (q, step, offset), part in zip(parts, y.split(PART)):
            real = part[: len(step)]
            torch.mul(offset, self._sums, out=real)
            self._product(q, part)  # into memory that is there: to ask for more takes as long as the product
            # multiplied, then added: one call for both may round otherwise at the end of a tensor than within
            real.mul_(step)
            if self._bias is not None:
                real.add_(self._bias)
        return y[:rows].view(*shape, self._outputs)

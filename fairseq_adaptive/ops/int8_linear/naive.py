"""The definition of a linear map whose product is one of small integers.

A row x of the input is taken for ``low + step q`` with q from 0 to 255, where low and step are its own, and a row w of the
weight for ``scale v`` with v from -127 to 127. Then ``x . w = step scale (q . v) + low scale sum(v)``: one product of
integers, which is exact, and two numbers for each row and each column. What a row gives depends on that row alone.
"""

from typing import NamedTuple, Optional, Tuple

import torch
from torch import Tensor

LEVELS, LARGEST = 255, 127  # of q and of v
LEAST = 1e-20  # of a range: that of equal numbers is 0


class Rounded(NamedTuple):
    """Rows as integers.

    Attributes:
        q: ``[R, I]``, 0 to 255
        step, low: ``[R, 1]``
    """

    q: Tensor
    step: Tensor
    low: Tensor


def round_weight(weight: Tensor) -> Tuple[Tensor, Tensor]:
    """Return v, int8 ``[O, I]``, and scale, ``[O]``: the largest number of each row becomes 127 or -127.

    Args:
        weight: ``[O, I]``, with I of 1 or more
    """
    scale = weight.abs().amax(1).clamp_min(LEAST) / LARGEST
    return (weight / scale[:, None]).round().to(torch.int8), scale


def limits(x: Tensor) -> Tuple[Tensor, Tensor]:
    """Return low and step of each row, ``[R, 1]``: the least number, and its distance to the greatest by 255; what is not
    finite stays so."""
    low = x.amin(1, keepdim=True)
    return low, x.amax(1, keepdim=True).sub_(low).clamp_min_(LEAST).div_(LEVELS)


def round_rows(x: Tensor) -> Rounded:
    """Return x, ``[R, I]``, as integers: the nearest ones, and of two that are as near the greater one."""
    low, step = limits(x)
    q = ((x - low) * step.reciprocal() + 0.5).floor().clamp(0, LEVELS)
    return Rounded(q.nan_to_num(0).to(torch.int64), step, low)


def int8_linear(x: Tensor, weight: Tensor, bias: Optional[Tensor] = None) -> Tensor:
    """Return ``x weight^T + bias``, ``[R, O]``, in float64, after both were rounded in the precision that they have.

    Args:
        x: ``[R, I]``
        weight: ``[O, I]``
        bias: ``[O]`` or None
    """
    v, scale = round_weight(weight)
    q, step, low = round_rows(x)
    v, scale = v.long(), scale.double()
    product = (q[:, None] * v).sum(2).double() * scale * step.double() + low.double() * (scale * v.sum(1))
    return product if bias is None else product + bias.double()

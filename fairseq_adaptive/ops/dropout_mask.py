"""Random masks of dropout, at a price that does not show."""

from typing import Optional, Tuple

import torch
from torch import Tensor

CHOICES = 2**16  # of a 16-bit random number


def keeps_some(probability: float) -> bool:
    """Whether 16 bits can say which elements this probability drops."""
    return 0 < round((1 - probability) * CHOICES) < CHOICES


def dropout_mask(
    shape: Tuple[int, ...], probability: float, dtype: torch.dtype, generator: Optional[torch.Generator] = None
) -> Tensor:
    """Return a mask on the CPU, of the given shape, to multiply by: 0, or what keeps the expectation.

    torch draws 32 bits or more for an element, which takes five times as long. The probability is rounded to a multiple
    of 1 / 65,536.

    Args:
        shape: of the mask
        probability: of a 0
        dtype: of the mask
        generator: where the random numbers come from
    """
    kept = round((1 - probability) * CHOICES)
    count = torch.Size(shape).numel()
    words = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    mask = words.view(torch.int16)[:count].view(shape) < kept - CHOICES // 2
    return mask.to(dtype).mul_(CHOICES / kept)

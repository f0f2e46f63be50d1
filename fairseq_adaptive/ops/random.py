"""Random masks that cost little on a CPU."""

from typing import Optional, Sequence

import torch
from torch import Tensor

CHOICES = 2**16  # of a 16-bit random number


def kept_of(probability: float) -> float:
    """The probability to survive a dropout of ``probability``, as a multiple of ``1 / CHOICES``."""
    return round((1 - probability) * CHOICES) / CHOICES


def survivors(shape: Sequence[int], kept: float, device, generator: Optional[torch.Generator] = None) -> Tensor:
    """A tensor of bools, each True with probability ``kept`` (of :func:`kept_of`), from 16 random bits an element."""
    count = torch.Size(shape).numel()
    words = torch.empty(-(-count // 4), dtype=torch.int64, device=device).random_(-(2**63), None, generator=generator)
    return words.view(torch.int16)[:count].view(shape) < round(kept * CHOICES) - CHOICES // 2

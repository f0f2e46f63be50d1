"""An update of adaptive computation time after a depth: halting unit, sums and states in one pass over the states."""

from typing import Optional

import torch
from torch import Tensor

from fairseq_adaptive.ops.halting_update.naive import Update
from fairseq_adaptive.ops.registry import Op

OP = Op(
    "halting_update", {"triton": f"{__name__}.triton:halting_update", "torch": f"{__name__}.rows:halting_update"}
)


def halting_update(
    before: Tensor,
    after: Tensor,
    weight: Tensor,
    bias: Tensor,
    halting: Tensor,
    remainders: Tensor,
    running: Tensor,
    threshold: float,
    output: Optional[Tensor] = None,
) -> Update:
    """Return what ``naive.py`` defines, in its precision under autocast, too.

    Args:
        before, after: ... x C
        weight: C
        bias: 1
        halting, remainders: ..., float32 or float64
        running: ..., bool
        threshold: in (0, 1]
        output: ... x C of the type of ``halting``, or None
    """
    update = OP.implementation(before, before.dtype)
    with torch.autocast(before.device.type, enabled=False):
        return Update(*update(running, threshold, before, after, output, weight, bias, halting, remainders))

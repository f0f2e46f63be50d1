"""What the launchers of kernels that work on blocks of rows share."""

from typing import Dict

import torch
import triton
from torch import Tensor

ELEMENTS = 2048  # of the states that four warps hold; with twice as many, registers spill (compiled for sm_90)


def block(width: int) -> Dict[str, int]:
    """Return what a kernel needs whose programs hold blocks of whole rows; Triton wants powers of two."""
    columns = triton.next_power_of_2(width)
    warps = min(4 * max(1, columns // ELEMENTS), 16)
    return {"block_rows": max(1, ELEMENTS // columns), "block_width": columns, "num_warps": warps}


def programs(x: Tensor, blocks: int) -> int:
    """Return how many programs share ``blocks`` where each keeps a sum of its own: enough to fill the device of x."""
    most = 4 * torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2
    return min(blocks, most)

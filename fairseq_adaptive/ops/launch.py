"""What the launchers of kernels that work on blocks of rows share."""

import torch
import triton
from torch import Tensor

ELEMENTS = 2048  # of the states that a program holds


def block(width: int):
    """Return (rows, columns) of a block that holds whole rows: powers of two, as Triton wants them."""
    columns = triton.next_power_of_2(width)
    return max(1, ELEMENTS // columns), columns


def programs(x: Tensor, blocks: int) -> int:
    """Return how many programs share ``blocks`` where each keeps a sum of its own: enough to fill the device of x."""
    most = 4 * torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2
    return min(blocks, most)

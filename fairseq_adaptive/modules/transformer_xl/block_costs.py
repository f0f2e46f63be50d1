"""What a step of a block, or of several, costs: in FLOPs or in time."""

import statistics
import time
from typing import Callable, Dict

import torch
from torch.utils.flop_counter import FlopCounterMode

MEASURES = ("flops", "time")


def cost(step: Callable[[], None], measure: str = "flops", repeats: int = 5) -> float:
    """The FLOPs of a step, or its seconds: the median of ``repeats``."""
    if measure == "flops":
        with FlopCounterMode(display=False) as counter:
            step()
        return float(counter.get_total_flops())
    seconds = []
    for _ in range(repeats):
        _finish()
        start = time.perf_counter()
        step()
        _finish()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _finish():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def block_costs(
    blocks: Dict[str, torch.nn.Module], arguments: Dict[str, tuple], x, measure="flops"
) -> Dict[str, float]:
    """Forward and backward of each block, alone; gradients and random states stay as they were.

    Args:
        blocks: kind and module
        arguments: kind and what the module takes besides ``x``
        x: of the shape, dtype and device that count, ``[B, T, C]``
        measure: ``flops`` or ``time``

    Returns:
        kind and cost, in FLOPs or in seconds
    """
    costs = {}
    for kind, block in blocks.items():
        gradients = [parameter.grad for parameter in block.parameters()]
        with torch.enable_grad(), torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):

            def step(block=block, more=arguments[kind]):
                y = block(torch.randn_like(x).requires_grad_(), *more)
                y.backward(torch.ones_like(y))

            if measure == "time":
                step()
            costs[kind] = cost(step, measure)
        for parameter, gradient in zip(block.parameters(), gradients, strict=True):
            parameter.grad = gradient
    return costs

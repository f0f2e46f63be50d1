"""An update of adaptive computation time after a depth: halting unit, sums and states in one pass over the states."""

from typing import Optional

import torch
from torch import Tensor

from fairseq_adaptive.ops.halting_update.naive import Update
from fairseq_adaptive.ops.registry import Op

__all__ = ["OP", "Update", "halting_update"]
OP = Op("halting_update", {"triton": f"{__name__}.triton", "torch": f"{__name__}.eager"})


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
    operands = before, after, output, weight, bias, halting, remainders
    if not before.is_cuda and not torch.is_grad_enabled() and not torch.is_autocast_enabled(before.device.type):
        infer = getattr(OP.implementation(before, before.dtype), "infer", None)
        if infer is not None:
            return Update(*infer(*operands, running, threshold))
    with torch.autocast(before.device.type, enabled=False):
        return Update(*_HaltingUpdate.apply(running, threshold, *operands))


class _HaltingUpdate(torch.autograd.Function):
    """Decisions count as constants, the probabilities that lead to them do not."""

    @staticmethod
    def forward(ctx, running, threshold, *inputs):
        before = inputs[0]
        ctx.backend = OP.implementation(before, before.dtype)
        *update, share = ctx.backend.forward(*inputs, running, threshold)
        update = Update(*update)
        ctx.save_for_backward(*inputs[:4], running, update.running, update.probability, share)
        ctx.mark_non_differentiable(update.running)
        return tuple(update)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, state, output, halting, remainders, _, probability):
        grads = (state, output, halting, remainders, probability)
        with torch.autocast(state.device.type, enabled=False):
            return None, None, *ctx.backend.backward(*ctx.saved_tensors, *grads)

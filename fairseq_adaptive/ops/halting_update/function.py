"""The gradient of the update, whichever kernels compute it."""

import torch


class HaltingUpdate(torch.autograd.Function):
    """:func:`~fairseq_adaptive.ops.halting_update.naive.halting_update`; decisions count as constants.

    Args:
        forward_rows: takes ``inputs``, running and threshold, and returns the fields of an ``Update`` and the share of
            each token's new state in the result, ...
        backward_rows: takes before, after, output, weight, running, going_on, probability, share and the gradients of
            state, output, halting, remainders and probability; returns those of ``inputs``
        inputs: before, after, output, weight, bias, halting, remainders
    """

    @staticmethod
    def forward(ctx, forward_rows, backward_rows, running, threshold, *inputs):
        *update, share = forward_rows(*inputs, running, threshold)
        going_on, probability = update[4:]
        ctx.backward_rows = backward_rows
        ctx.save_for_backward(*inputs[:4], running, going_on, probability, share)
        ctx.mark_non_differentiable(going_on)
        return tuple(update)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, state, output, halting, remainders, _, probability):
        grads = (state, output, halting, remainders, probability)
        return None, None, None, None, *ctx.backward_rows(*ctx.saved_tensors, *grads)

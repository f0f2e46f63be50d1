"""Label-smoothed cross-entropy of output layers in chunks of rows, with the gradient taken on the way.

A loss is the last thing in a graph, so that its gradient is known up to the factor by which the backward pass
multiplies. Only the logits of one chunk exist at any time: they become their gradient, which gives
hidden's and weight's.
"""

import torch

from fairseq_adaptive.ops.matmul import linear

CHUNK = 256  # rows whose logits exist at the same time
WORDS = 1024  # of a CPU's products for a table that is wider than the chunk is long


def sum_up(hidden, weight, bias, target, label_smoothing, rows, dtype, grads, count=False):
    """Return (loss, nll, right), sums over N rows, and write gradients of the loss to ``grads``.

    Args:
        hidden, weight, bias, target, label_smoothing: as for the definition in ``naive.py``
        rows: what computes loss and gradient of logits
        dtype: of the matrices that are multiplied; softmax, losses and gradients' sums are at least float32
        grads: one to write to for each of hidden, weight and bias, or None
        count: whether to count the right words
    """
    exact = torch.promote_types(dtype, torch.float32)
    loss, nll, right = (hidden.new_zeros((), dtype=kind) for kind in (exact, exact, torch.long))
    table, offset = weight.to(dtype), None if bias is None else bias.to(dtype)
    label_smoothing = label_smoothing if len(weight) > 1 else 0.0
    hidden_grad, weight_grad, bias_grad = grads
    wanted = any(grad is not None for grad in grads)
    for grad in (weight_grad, bias_grad):
        if grad is not None and not len(target):
            grad.zero_()
    for start in range(0, len(target), CHUNK):
        chunk = slice(start, start + CHUNK)
        states, words = hidden[chunk].to(dtype), target[chunk]
        logits = linear(states, table, offset)  # [n, V]
        if count:
            right += logits.argmax(-1).eq(words).sum()
        row_loss, row_nll, logits = rows(logits, words, label_smoothing, wanted)
        loss += row_loss.sum()
        nll += row_nll.sum()
        if hidden_grad is not None:
            hidden_grad[chunk] = linear(logits, table.t())
        old = 1 if start else 0
        if weight_grad is not None:  # in half precision the product is rounded, but not the sum over chunks
            _add_product(weight_grad, logits, states, old)
        if bias_grad is not None:
            _add(bias_grad, logits.sum(0, dtype=exact), old)
    return loss, nll, right


def _add(total, term, old):
    return total.add_(term) if old else total.copy_(term)


def _add_product(total, logits, states, old):
    """Add ``logits^T states``, ``[V, C]``; the smaller of states and of what is added to is laid out anew for it."""
    if states.size(1) < len(states) or logits.device.type != "cpu":
        _add(total, linear(states.t(), logits.t()).t(), old)
        return
    for start in range(0, len(total), WORDS):
        words = slice(start, start + WORDS)
        _add(total[words], linear(logits[:, words].t(), states.t()), old)


def scaled(ctx, factor):
    """Return the gradients that ``ctx.grads`` has kept, times that of the loss, once."""
    if ctx.grads is None:
        raise RuntimeError("a fused cross-entropy keeps its gradient for one backward pass only")
    grads, ctx.grads = ctx.grads, None  # given away, so that a parameter can take the tensor itself
    if factor.device.type == "cpu" and factor == 1:
        return grads  # large tables are not read and written for nothing
    return [None if grad is None else grad.mul_(factor.to(grad.dtype)) for grad in grads]


class ChunkedCrossEntropy(torch.autograd.Function):
    """:func:`sum_up` with a gradient of its loss; ``gradient`` says whether one will be asked for."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, target, label_smoothing, rows, dtype, gradient, count):
        inputs, exact = (hidden, weight, bias), torch.promote_types(dtype, torch.float32)
        wanted = [gradient and needed for needed in ctx.needs_input_grad[:3]]
        grads = [torch.empty_like(each, dtype=exact) if want else None for each, want in zip(inputs, wanted)]
        loss, nll, right = sum_up(*inputs, target, label_smoothing, rows, dtype, grads, count)
        ctx.grads = [None if grad is None else grad.to(each.dtype) for each, grad in zip(inputs, grads)]
        ctx.mark_non_differentiable(nll, right)
        return loss, nll, right

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, factor, *_):
        return *scaled(ctx, factor), *[None] * 6

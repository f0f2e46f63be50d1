"""The loss of an adaptive softmax (Grave et al., 2017): a cross-entropy of each cluster, all gradients in one place."""

import torch

from fairseq_adaptive.ops.cross_entropy.chunked import scaled, sum_up


class ClusteredCrossEntropy(torch.autograd.Function):
    """The sums of :func:`~fairseq_adaptive.ops.cross_entropy.chunked.sum_up` over the head and K tails.

    Autograd would put the gradient of a table that all clusters share together from those of the clusters, which takes
    as much memory and time again; here each cluster writes to its rows of one tensor.

    Args:
        targets: of the head ``[N]``, then of each tail ``[n]``
        sizes: words of each cluster
        label_smoothing, rows, dtype, gradient: as for ``ChunkedCrossEntropy``
        bias: ``[V]``
        cluster_weight, cluster_bias: ``[K, C]`` and ``[K]``, which stand for the tails in the head
        inputs: hidden states of each cluster, ``[N, C]`` and ``[n, C']``, then one table for all or one for each
    """

    @staticmethod
    def forward(
        ctx, targets, sizes, label_smoothing, rows, dtype, gradient, bias, cluster_weight, cluster_bias, *inputs
    ):
        exact = torch.promote_types(dtype, torch.float32)
        inputs = (bias, cluster_weight, cluster_bias, *inputs)
        grads = [torch.empty_like(each, dtype=exact) if gradient else None for each in inputs]
        parts, grad_parts = _of_clusters(inputs, sizes), _of_clusters(grads, sizes)

        hidden, *head = parts[0]
        head = [torch.cat(pair) for pair in zip(head, inputs[1:3])]  # words, then clusters
        head_grads = [torch.empty_like(each, dtype=exact) if gradient else None for each in head]
        into = (grad_parts[0][0], *head_grads)
        loss, nll, _ = sum_up(hidden, *head, targets[0], label_smoothing, rows, dtype, into)
        if gradient:
            for whole, *halves in zip(head_grads, grad_parts[0][1:], grads[1:3]):
                for half, values in zip(halves, whole.split([len(half) for half in halves])):
                    half.copy_(values)
        for target, part, grad_part in zip(targets[1:], parts[1:], grad_parts[1:]):
            tail_loss, tail_nll, _ = sum_up(*part, target, label_smoothing, rows, dtype, grad_part)
            loss, nll = loss + tail_loss, nll + tail_nll
        ctx.grads = [None if grad is None else grad.to(each.dtype) for each, grad in zip(inputs, grads)]
        ctx.mark_non_differentiable(nll)
        return loss, nll

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, factor, _):
        return *[None] * 6, *scaled(ctx, factor)


def _of_clusters(tensors, sizes):
    """(hidden, weight, bias) of each cluster, or a None for each, of bias, two more, hidden states and tables."""
    bias, _, _, *rest = tensors
    if bias is None:
        return [(None, None, None)] * len(sizes)
    hiddens, tables = rest[: len(sizes)], rest[len(sizes) :]
    return list(zip(hiddens, tables[0].split(sizes) if len(tables) == 1 else tables, bias.split(sizes)))

"""Relative attention on Triton's kernels, whose products a counter of FLOPs can see."""

import torch
import triton
from torch.utils.flop_counter import register_flop_formula

from fairseq_adaptive.ops.random import kept_of
from fairseq_adaptive.ops.relative_attention import kernels

BLOCK = 32  # queries and keys; a power of two, 16 or more


def _settings(queries, keys, window, kept, seed):
    _, batch, queried, dim = queries.shape
    length = keys.size(2)
    sizes = batch, queried, length, dim, length if window is None else window, dim**-0.5, kept, seed
    return *sizes, kept < 1, BLOCK, max(16, triton.next_power_of_2(dim))


def _stages(queries):
    """How many blocks are loaded ahead: in float32 one fills as much shared memory as there may be."""
    return {"num_stages": 1 if queries.dtype == torch.float32 else 3}


@torch.library.custom_op("fairseq_adaptive::relative_attention", mutates_args=())
def _run_forward(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, distances: torch.Tensor,
    content_bias: torch.Tensor, position_bias: torch.Tensor, window: int | None, kept: float, seed: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return the output and the logarithms of the rows' sums, ``[H, B, T]`` in float32; inputs are contiguous."""
    heads, batch, queried, _ = queries.shape
    out, normalisers = torch.empty_like(queries), queries.new_empty(heads, batch, queried, dtype=torch.float32)
    if queries.numel():
        inputs = queries, keys, values, distances, content_bias, position_bias
        grid = triton.cdiv(queried, BLOCK), heads * batch
        settings = _settings(queries, keys, window, kept, seed)
        kernels.forward[grid](*inputs, out, normalisers, *settings, **_stages(queries))
    return out, normalisers


@torch.library.custom_op("fairseq_adaptive::relative_attention_backward", mutates_args=())
def _run_backward(
    grad: torch.Tensor, out: torch.Tensor, normalisers: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor,
    values: torch.Tensor, distances: torch.Tensor, content_bias: torch.Tensor, position_bias: torch.Tensor,
    window: int | None, kept: float, seed: int,
) -> list[torch.Tensor]:  # fmt: skip
    """Return the gradients of queries with each bias, over the square root of D, and of keys, values, distances."""
    heads, batch, queried, _ = queries.shape
    by_content, by_position = (torch.zeros_like(queries, dtype=torch.float32) for _ in range(2))
    others = [torch.zeros_like(each) for each in (keys, values, distances)]
    if queries.numel():
        deltas = (grad.float() * out.float()).sum(-1)
        inputs = queries, keys, values, distances, content_bias, position_bias, grad, normalisers, deltas
        settings, stages = _settings(queries, keys, window, kept, seed), _stages(queries)
        for kernel, positions, programs, outputs in (
            (kernels.backward_queries, queried, heads * batch, (by_content, by_position)),
            (kernels.backward_keys, keys.size(2), heads * batch, others[:2]),
            (kernels.backward_distances, distances.size(1), heads, others[2:]),
        ):
            kernel[triton.cdiv(positions, BLOCK), programs](*inputs, *outputs, *settings, **stages)
    return [by_content, by_position, *others]


@register_flop_formula(torch.ops.fairseq_adaptive.relative_attention)
def _forward_flops(queries, keys, *args, **kwargs):
    heads, batch, queried, dim = queries
    return 2 * heads * batch * queried * dim * (3 * keys[2] + 1)


@register_flop_formula(torch.ops.fairseq_adaptive.relative_attention_backward)
def _backward_flops(grad, out, normalisers, queries, keys, *args, **kwargs):
    heads, batch, queried, dim = queries
    return 2 * heads * batch * queried * dim * (8 * keys[2] + 3)  # the products that a backward pass needs, each once


class FlashRelativeAttention(torch.autograd.Function):
    """The kernels, with gradients of the first six inputs."""

    @staticmethod
    def forward(ctx, *inputs):
        tensors, settings = [each.contiguous() for each in inputs[:6]], inputs[6:]
        out, normalisers = _run_forward(*tensors, *settings)
        ctx.save_for_backward(out, normalisers, *tensors)
        ctx.settings = settings
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        out, normalisers, *tensors = ctx.saved_tensors
        run = _run_backward(grad.contiguous(), out, normalisers, *tensors, *ctx.settings)
        by_content, by_position, *others = run
        queries, biases, scale = tensors[0], tensors[4:], tensors[0].size(3) ** -0.5
        biases_grad = [
            (each.sum((1, 2)) * scale).to(bias.dtype) for each, bias in zip((by_content, by_position), biases)
        ]
        return (by_content.add_(by_position) * scale).to(queries.dtype), *others, *biases_grad, None, None, None


def attend(queries, keys, values, distances, content_bias, position_bias, window, dropout):
    """As ``naive.py`` defines it, with the dtype of ``queries`` for all but the biases."""
    kept = kept_of(dropout)
    if not kept:
        return queries * 0.0
    seed = int(torch.randint(2**62, ())) if kept < 1 else 0
    return FlashRelativeAttention.apply(
        queries, keys, values, distances, content_bias, position_bias, window, kept, seed
    )


@torch.library.custom_op("fairseq_adaptive::relative_attention_queries", mutates_args=())
def _run_from(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, by_position: torch.Tensor,
    content_bias: torch.Tensor, place: torch.Tensor, window: int | None, seen: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """Return the output; inputs are contiguous."""
    heads, groups, queried, dim = queries.shape
    out, length = torch.empty_like(queries), keys.size(2)
    if queries.numel():
        grid = triton.cdiv(queried, BLOCK), heads * groups
        sizes = groups, queried, length, dim, length if window is None else window, dim**-0.5
        shown = place if seen is None else seen
        inputs = queries, keys, values, by_position, content_bias, place, shown, out
        width = max(16, triton.next_power_of_2(dim))
        kernels.forward_from[grid](*inputs, *sizes, seen is not None, BLOCK, width, **_stages(queries))
    return out


@register_flop_formula(torch.ops.fairseq_adaptive.relative_attention_queries)
def _from_flops(queries, keys, *args, **kwargs):
    heads, groups, queried, dim = queries
    return 2 * heads * groups * queried * dim * 2 * keys[2]  # those with distances are counted as they are


def attend_from(queries, keys, values, distances, content_bias, position_bias, place, window=None, seen=None):
    """As ``naive.py`` defines ``query_attention``, without a gradient: all scores with distances are in memory."""
    heads, groups, queried, dim = queries.shape
    by_position = torch.add((position_bias * dim**-0.5).to(queries.dtype)[:, None, None], queries, alpha=dim**-0.5)
    by_position = torch.bmm(by_position.flatten(1, 2), distances.transpose(1, 2))
    tensors = [each.contiguous() for each in (queries, keys, values, by_position, content_bias, place)]
    return _run_from(*tensors, window, None if seen is None else seen.to(torch.uint8).contiguous())

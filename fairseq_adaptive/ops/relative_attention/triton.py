"""Relative attention in Triton: scores exist for a block of queries and a block of keys at a time.

Query i and key j meet distance number ``T - i + j``: those of a block of n queries and n keys are a band of 2n - 1
distances. One product gives the queries' scores with the band, of which each row picks n, one further to the left than
the row before.
"""

import torch
import triton
import triton.language as tl
from torch.utils.flop_counter import register_flop_formula

from fairseq_adaptive.ops.random import kept_of

BLOCK = 32  # queries and keys; a power of two, 16 or more
LOWEST = tl.constexpr(-1e30)  # a maximum of no scores


@triton.jit
def _load(base, rows, count, dim, columns):
    """Rows ``[n, C]`` of a matrix ``[count, dim]``, zeros outside."""
    inside = ((rows >= 0) & (rows < count))[:, None] & (columns < dim)[None, :]
    return tl.load(base + rows[:, None] * dim + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _store(base, values, rows, count, dim, columns):
    inside = ((rows >= 0) & (rows < count))[:, None] & (columns < dim)[None, :]
    tl.store(base + rows[:, None] * dim + columns[None, :], values.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _with_bias(queries, bias, dim, columns, scale):
    """``(q + bias) / sqrt(D)`` in the dtype of q."""
    added = tl.load(bias + columns, mask=columns < dim, other=0.0).to(tl.float32)
    return ((queries.to(tl.float32) + added[None, :]) * scale).to(queries.dtype)


@triton.jit
def _dot(x, y):
    return tl.dot(x, y, input_precision="ieee")


@triton.jit
def _scores(by_content, by_position, keys, band, block: tl.constexpr):
    """``[n, n]`` of queries and keys ``[n, C]`` and the band ``[2n, C]`` of their distances, the longest first."""
    row, column = tl.arange(0, block), tl.arange(0, block)
    place = block - 1 - row[:, None] + column[None, :]
    by_distance = _dot(by_position, tl.trans(band))
    return _dot(by_content, tl.trans(keys)) + tl.gather(by_distance, place, 1)


@triton.jit
def _visible(row, column, queried, length, window):
    distance = length - queried + row - column
    return (distance >= 0) & (distance < window) & (column >= 0) & (column < length)


@triton.jit
def _survivors(seed, pair, row, column, length, kept):
    """What to multiply weights with; the numbers of a pair of head and row of the batch are a stream of their own."""
    return tl.where(tl.rand(seed + pair, row * length + column) < kept, 1.0 / kept, 0.0)


@triton.jit
def _weights(scores, normaliser, row, column, queried, length, window):
    """Softmax by what the forward pass has kept; 0 for rows that are none."""
    visible = _visible(row[:, None], column, queried, length, window)
    return tl.where(visible & (row < queried)[:, None], tl.exp(scores - normaliser[:, None]), 0.0)


@triton.jit
def _forward(
    queries, keys, values, distances, content_bias, position_bias, out, normalisers,
    batch, queried, length, dim, window, scale, kept, seed, dropped: tl.constexpr, block: tl.constexpr,
    width: tl.constexpr,
):  # fmt: skip
    """One program for a block of queries of one head and row of the batch."""
    pair, first = tl.program_id(1).to(tl.int64), tl.program_id(0) * block
    head, before = pair // batch, length - queried
    row, columns = first + tl.arange(0, block), tl.arange(0, width)
    keys, values = keys + pair * length * dim, values + pair * length * dim
    distances += head * (length + 1) * dim
    states = _load(queries + pair * queried * dim, row, queried, dim, columns)
    by_content = _with_bias(states, content_bias + head * dim, dim, columns, scale)
    by_position = _with_bias(states, position_bias + head * dim, dim, columns, scale)

    highest, total = tl.full((block,), LOWEST, tl.float32), tl.zeros((block,), tl.float32)
    summed = tl.zeros((block, width), tl.float32)
    for start in range(tl.maximum(0, before + first - window + 1), tl.minimum(length, before + first + block), block):
        key = start + tl.arange(0, block)
        band = _load(distances, queried - first - block + 1 + start + tl.arange(0, 2 * block), length + 1, dim, columns)
        scores = _scores(by_content, by_position, _load(keys, key, length, dim, columns), band, block)
        scores = tl.where(_visible(row[:, None], key[None, :], queried, length, window), scores, -float("inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        weights, shrink = tl.exp(scores - higher[:, None]), tl.exp(highest - higher)
        total = total * shrink + tl.sum(weights, 1)
        if dropped:
            weights *= _survivors(seed, pair, row[:, None], key[None, :], length, kept)
        block_values = _load(values, key, length, dim, columns)
        summed = summed * shrink[:, None] + _dot(weights.to(block_values.dtype), block_values)
        highest = higher
    _store(out + pair * queried * dim, summed / total[:, None], row, queried, dim, columns)
    tl.store(normalisers + pair * queried + row, highest + tl.log(total), mask=row < queried)


@triton.jit
def _of_scores(weights, out_grad, values, delta, survivors):
    """The gradient of scores: of the softmax of what ``out_grad`` makes of values."""
    return weights * (_dot(out_grad, tl.trans(values)) * survivors - delta[:, None])


@triton.jit
def _backward_queries(
    queries, keys, values, distances, content_bias, position_bias, out_grad, normalisers, deltas,
    by_content_grad, by_position_grad,
    batch, queried, length, dim, window, scale, kept, seed, dropped: tl.constexpr, block: tl.constexpr,
    width: tl.constexpr,
):  # fmt: skip
    """As :func:`_forward`: gradients of ``(q + u) / sqrt(D)`` and ``(q + v) / sqrt(D)``."""
    pair, first = tl.program_id(1).to(tl.int64), tl.program_id(0) * block
    head, before = pair // batch, length - queried
    row, columns = first + tl.arange(0, block), tl.arange(0, width)
    keys, values = keys + pair * length * dim, values + pair * length * dim
    distances += head * (length + 1) * dim
    states = _load(queries + pair * queried * dim, row, queried, dim, columns)
    by_content = _with_bias(states, content_bias + head * dim, dim, columns, scale)
    by_position = _with_bias(states, position_bias + head * dim, dim, columns, scale)
    grad = _load(out_grad + pair * queried * dim, row, queried, dim, columns)
    normaliser = tl.load(normalisers + pair * queried + row, mask=row < queried, other=0.0)
    delta = tl.load(deltas + pair * queried + row, mask=row < queried, other=0.0)

    content_grad, position_grad = tl.zeros((block, width), tl.float32), tl.zeros((block, width), tl.float32)
    for start in range(tl.maximum(0, before + first - window + 1), tl.minimum(length, before + first + block), block):
        key = start + tl.arange(0, block)
        band = _load(distances, queried - first - block + 1 + start + tl.arange(0, 2 * block), length + 1, dim, columns)
        block_keys = _load(keys, key, length, dim, columns)
        scores = _scores(by_content, by_position, block_keys, band, block)
        weights = _weights(scores, normaliser, row, key[None, :], queried, length, window)
        survivors = _survivors(seed, pair, row[:, None], key[None, :], length, kept) if dropped else 1.0
        scores_grad = _of_scores(weights, grad, _load(values, key, length, dim, columns), delta, survivors)
        # back from rows of keys to rows of the band
        place = tl.arange(0, 2 * block)[None, :] - (block - 1) + tl.arange(0, block)[:, None]
        known = (place >= 0) & (place < block)
        banded = tl.where(known, tl.gather(scores_grad, tl.where(known, place, 0), 1), 0.0)
        content_grad += _dot(scores_grad.to(block_keys.dtype), block_keys)
        position_grad += _dot(banded.to(band.dtype), band)
    _store(by_content_grad + pair * queried * dim, content_grad, row, queried, dim, columns)
    _store(by_position_grad + pair * queried * dim, position_grad, row, queried, dim, columns)


@triton.jit
def _backward_keys(
    queries, keys, values, distances, content_bias, position_bias, out_grad, normalisers, deltas, keys_grad, values_grad,
    batch, queried, length, dim, window, scale, kept, seed, dropped: tl.constexpr, block: tl.constexpr,
    width: tl.constexpr,
):  # fmt: skip
    """One program for a block of keys of one head and row of the batch: their gradients and those of their values."""
    pair, start = tl.program_id(1).to(tl.int64), tl.program_id(0) * block
    head, before = pair // batch, length - queried
    key, columns = start + tl.arange(0, block), tl.arange(0, width)
    queries, out_grad = queries + pair * queried * dim, out_grad + pair * queried * dim
    distances += head * (length + 1) * dim
    block_keys = _load(keys + pair * length * dim, key, length, dim, columns)
    block_values = _load(values + pair * length * dim, key, length, dim, columns)

    key_grad, value_grad = tl.zeros((block, width), tl.float32), tl.zeros((block, width), tl.float32)
    # the first query at the first key, and the last one that still sees the last key
    for first in range(tl.maximum(0, start - before), tl.minimum(queried, start + block - 1 - before + window), block):
        row = first + tl.arange(0, block)
        states, grad = _load(queries, row, queried, dim, columns), _load(out_grad, row, queried, dim, columns)
        by_content = _with_bias(states, content_bias + head * dim, dim, columns, scale)
        by_position = _with_bias(states, position_bias + head * dim, dim, columns, scale)
        normaliser = tl.load(normalisers + pair * queried + row, mask=row < queried, other=0.0)
        delta = tl.load(deltas + pair * queried + row, mask=row < queried, other=0.0)
        band = _load(distances, queried - first - block + 1 + start + tl.arange(0, 2 * block), length + 1, dim, columns)
        scores = _scores(by_content, by_position, block_keys, band, block)
        weights = _weights(scores, normaliser, row, key[None, :], queried, length, window)
        survivors = _survivors(seed, pair, row[:, None], key[None, :], length, kept) if dropped else 1.0
        scores_grad = _of_scores(weights, grad, block_values, delta, survivors)
        key_grad += _dot(tl.trans(scores_grad.to(by_content.dtype)), by_content)
        value_grad += _dot(tl.trans((weights * survivors).to(grad.dtype)), grad)
    _store(keys_grad + pair * length * dim, key_grad, key, length, dim, columns)
    _store(values_grad + pair * length * dim, value_grad, key, length, dim, columns)


@triton.jit
def _backward_distances(
    queries, keys, values, distances, content_bias, position_bias, out_grad, normalisers, deltas, distances_grad,
    batch, queried, length, dim, window, scale, kept, seed, dropped: tl.constexpr, block: tl.constexpr,
    width: tl.constexpr,
):  # fmt: skip
    """One program for a block of distances of one head; here keys are the band, and a row picks further to the right."""
    head, start = tl.program_id(1).to(tl.int64), tl.program_id(0) * block
    number, columns = start + tl.arange(0, block), tl.arange(0, width)
    own = _load(distances + head * (length + 1) * dim, number, length + 1, dim, columns)
    place = tl.arange(0, block)[:, None] + tl.arange(0, block)[None, :]
    total = tl.zeros((block, width), tl.float32)
    for pair in range(head * batch, head * batch + batch):
        for first in range(0, queried, block):
            row, band = first + tl.arange(0, block), start - queried + first + tl.arange(0, 2 * block)
            states = _load(queries + pair * queried * dim, row, queried, dim, columns)
            grad = _load(out_grad + pair * queried * dim, row, queried, dim, columns)
            by_content = _with_bias(states, content_bias + head * dim, dim, columns, scale)
            by_position = _with_bias(states, position_bias + head * dim, dim, columns, scale)
            normaliser = tl.load(normalisers + pair * queried + row, mask=row < queried, other=0.0)
            delta = tl.load(deltas + pair * queried + row, mask=row < queried, other=0.0)
            by_key = _dot(by_content, tl.trans(_load(keys + pair * length * dim, band, length, dim, columns)))
            by_value = _dot(grad, tl.trans(_load(values + pair * length * dim, band, length, dim, columns)))
            scores = _dot(by_position, tl.trans(own)) + tl.gather(by_key, place, 1)
            key = start - queried + first + place
            weights = _weights(scores, normaliser, row, key, queried, length, window)
            survivors = _survivors(seed, pair, row[:, None], key, length, kept) if dropped else 1.0
            scores_grad = weights * (tl.gather(by_value, place, 1) * survivors - delta[:, None])
            total += _dot(tl.trans(scores_grad.to(by_position.dtype)), by_position)
    _store(distances_grad + head * (length + 1) * dim, total, number, length + 1, dim, columns)


def _settings(queries, keys, window, kept, seed):
    _, batch, queried, dim = queries.shape
    length = keys.size(2)
    sizes = batch, queried, length, dim, length if window is None else window, dim**-0.5, kept, seed
    return *sizes, kept < 1, BLOCK, max(16, triton.next_power_of_2(dim))


@torch.library.custom_op("fairseq_adaptive::relative_attention", mutates_args=())
def _run_forward(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, distances: torch.Tensor, content_bias: torch.Tensor,
    position_bias: torch.Tensor, window: int | None, kept: float, seed: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return the output and the logarithms of the rows' sums, ``[H, B, T]`` in float32; inputs are contiguous."""
    heads, batch, queried, _ = queries.shape
    out, normalisers = torch.empty_like(queries), queries.new_empty(heads, batch, queried, dtype=torch.float32)
    if queries.numel():
        inputs = queries, keys, values, distances, content_bias, position_bias
        grid = triton.cdiv(queried, BLOCK), heads * batch
        _forward[grid](*inputs, out, normalisers, *_settings(queries, keys, window, kept, seed))
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
        settings, length = _settings(queries, keys, window, kept, seed), keys.size(2)
        _backward_queries[triton.cdiv(queried, BLOCK), heads * batch](*inputs, by_content, by_position, *settings)
        _backward_keys[triton.cdiv(length, BLOCK), heads * batch](*inputs, *others[:2], *settings)
        _backward_distances[triton.cdiv(length + 1, BLOCK), heads](*inputs, others[2], *settings)
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

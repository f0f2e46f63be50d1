"""Kernels of relative attention: scores exist for a block of queries and a block of keys at a time.

Query i and key j meet distance number ``T - i + j``: those of a block of n queries and n keys are a band of 2n - 1
distances. One product gives the queries' scores with the band, of which each row picks n, one further to the left than
the row before.
"""

import triton
import triton.language as tl

from fairseq_adaptive.ops.tiles import dot, load_rows, store_rows

LOWEST = tl.constexpr(-1e30)  # a maximum of no scores


@triton.jit
def _load(base, rows, count, dim, columns):
    """Rows ``[n, C]`` of a matrix ``[count, dim]``, zeros outside."""
    return load_rows(base, rows, (rows >= 0) & (rows < count), columns, dim, dim)


@triton.jit
def _store(base, values, rows, count, dim, columns):
    store_rows(base, values, rows, (rows >= 0) & (rows < count), columns, dim, dim)


@triton.jit
def _with_bias(queries, bias, dim, columns, scale):
    """``(q + bias) / sqrt(D)`` in the dtype of q."""
    added = tl.load(bias + columns, mask=columns < dim, other=0.0).to(tl.float32)
    return ((queries.to(tl.float32) + added[None, :]) * scale).to(queries.dtype)


@triton.jit
def _scores(by_content, by_position, keys, band, block: tl.constexpr):
    """``[n, n]`` of queries and keys ``[n, C]`` and the band ``[2n, C]`` of their distances, the longest first."""
    row, column = tl.arange(0, block), tl.arange(0, block)
    place = block - 1 - row[:, None] + column[None, :]
    by_distance = dot(by_position, tl.trans(band))
    return dot(by_content, tl.trans(keys)) + tl.gather(by_distance, place, 1)


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
def forward(
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
        summed = summed * shrink[:, None] + dot(weights.to(block_values.dtype), block_values)
        highest = higher
    _store(out + pair * queried * dim, summed / total[:, None], row, queried, dim, columns)
    tl.store(normalisers + pair * queried + row, highest + tl.log(total), mask=row < queried)


@triton.jit
def forward_from(
    queries, keys, values, by_position, content_bias, places, seen, out,
    groups, queried, length, dim, window, scale, hides: tl.constexpr, block: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """As :func:`forward`, of queries at any places, whose scores with all distances are there: ``[H, G, Q, K + 1]``."""
    pair, first = tl.program_id(1).to(tl.int64), tl.program_id(0) * block
    head, group = pair // groups, pair % groups
    row, columns = first + tl.arange(0, block), tl.arange(0, width)
    inside = row < queried
    keys, values = keys + pair * length * dim, values + pair * length * dim
    by_position += pair * queried * (length + 1)
    states = _load(queries + pair * queried * dim, row, queried, dim, columns)
    by_content = _with_bias(states, content_bias + head * dim, dim, columns, scale)
    place = tl.load(places + group * queried + row, mask=inside, other=0).to(tl.int32)
    nearest = tl.min(tl.where(inside, place, length))

    highest, total = tl.full((block,), LOWEST, tl.float32), tl.zeros((block,), tl.float32)
    summed = tl.zeros((block, width), tl.float32)
    for start in range(tl.maximum(0, nearest - window + 1), tl.max(place) + 1, block):
        key = start + tl.arange(0, block)
        apart = place[:, None] - key[None, :]
        visible = (apart >= 0) & (apart < window) & inside[:, None]
        if hides:
            shown = tl.load(seen + group * length + key, mask=key < length, other=0)
            visible = visible & ((shown[None, :] != 0) | (apart == 0))
        shifted = tl.load(by_position + row[:, None] * (length + 1) + length - apart, mask=visible, other=0.0)
        scores = dot(by_content, tl.trans(_load(keys, key, length, dim, columns))) + shifted.to(tl.float32)
        scores = tl.where(visible, scores, -float("inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        weights, shrink = tl.exp(scores - higher[:, None]), tl.exp(highest - higher)
        total = total * shrink + tl.sum(weights, 1)
        block_values = _load(values, key, length, dim, columns)
        summed = summed * shrink[:, None] + dot(weights.to(block_values.dtype), block_values)
        highest = higher
    _store(out + pair * queried * dim, summed / total[:, None], row, queried, dim, columns)


@triton.jit
def _of_scores(weights, out_grad, values, delta, survivors):
    """The gradient of scores: of the softmax of what ``out_grad`` makes of values."""
    return weights * (dot(out_grad, tl.trans(values)) * survivors - delta[:, None])


@triton.jit
def backward_queries(
    queries, keys, values, distances, content_bias, position_bias, out_grad, normalisers, deltas,
    by_content_grad, by_position_grad,
    batch, queried, length, dim, window, scale, kept, seed, dropped: tl.constexpr, block: tl.constexpr,
    width: tl.constexpr,
):  # fmt: skip
    """As :func:`forward`: gradients of ``(q + u) / sqrt(D)`` and ``(q + v) / sqrt(D)``."""
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
        content_grad += dot(scores_grad.to(block_keys.dtype), block_keys)
        position_grad += dot(banded.to(band.dtype), band)
    _store(by_content_grad + pair * queried * dim, content_grad, row, queried, dim, columns)
    _store(by_position_grad + pair * queried * dim, position_grad, row, queried, dim, columns)


@triton.jit
def backward_keys(
    queries, keys, values, distances, content_bias, position_bias, out_grad, normalisers, deltas,
    keys_grad, values_grad,
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
        key_grad += dot(tl.trans(scores_grad.to(by_content.dtype)), by_content)
        value_grad += dot(tl.trans((weights * survivors).to(grad.dtype)), grad)
    _store(keys_grad + pair * length * dim, key_grad, key, length, dim, columns)
    _store(values_grad + pair * length * dim, value_grad, key, length, dim, columns)


@triton.jit
def backward_distances(
    queries, keys, values, distances, content_bias, position_bias, out_grad, normalisers, deltas, distances_grad,
    batch, queried, length, dim, window, scale, kept, seed, dropped: tl.constexpr, block: tl.constexpr,
    width: tl.constexpr,
):  # fmt: skip
    """One program for a block of distances of one head; here keys are the band, and rows pick further to the right."""
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
            by_key = dot(by_content, tl.trans(_load(keys + pair * length * dim, band, length, dim, columns)))
            by_value = dot(grad, tl.trans(_load(values + pair * length * dim, band, length, dim, columns)))
            scores = dot(by_position, tl.trans(own)) + tl.gather(by_key, place, 1)
            key = start - queried + first + place
            weights = _weights(scores, normaliser, row, key, queried, length, window)
            survivors = _survivors(seed, pair, row[:, None], key, length, kept) if dropped else 1.0
            scores_grad = weights * (tl.gather(by_value, place, 1) * survivors - delta[:, None])
            total += dot(tl.trans(scores_grad.to(by_position.dtype)), by_position)
    _store(distances_grad + head * (length + 1) * dim, total, number, length + 1, dim, columns)

"""Attention with skimmed tokens in one pass over the keys (Dao et al., 2022, FlashAttention), sequences packed.

The formulas are those of ``eager.py``. Three kernels: the output, the gradient of queries, and the gradients of keys,
values and of who is kept. A program has a block of rows of one head of one sequence, and goes over the sequence's other
side block by block. What is multiplied has the precision of the inputs, everything else is float32.
"""

from typing import List, Optional, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fairseq_adaptive.ops.skim_attention.sequences import Sequences
from fairseq_adaptive.ops.tiles import dot, load_rows, store_rows

ROWS = 64  # of a block


@triton.jit
def _kept(kept, rows, inside, skims: tl.constexpr):
    if skims:
        return tl.load(kept + rows, mask=inside, other=0.0).to(tl.float32)
    else:
        return tl.where(inside, 1.0, 0.0)


@triton.jit
def _mask(seed, rows, columns, head, heads, total, dropout):
    """What dropout multiplies a weight by; the same for a row, a column and a head in every kernel."""
    number = (rows.to(tl.int64)[:, None] * heads + head) * total + columns[None, :]
    return tl.where(tl.rand(seed, number) >= dropout, 1.0 / (1.0 - dropout), 0.0)


@triton.jit
def _forward(
    q,
    k,
    v,
    kept,
    out,
    highest,
    total,
    offsets,
    stride,
    out_stride,
    scale,
    heads,
    rows_in_all,
    dropout,
    seed,
    skims: tl.constexpr,
    drops: tl.constexpr,
    dim: tl.constexpr,
    dim_block: tl.constexpr,
    size: tl.constexpr,
):
    head, sequence = tl.program_id(1), tl.program_id(2)
    first, end = tl.load(offsets + sequence), tl.load(offsets + sequence + 1)
    rows, dims = first + tl.program_id(0) * size + tl.arange(0, size), tl.arange(0, dim_block)
    inside = rows < end
    if first + tl.program_id(0) * size < end:
        queries = load_rows(q + head * dim, rows, inside, dims, dim, stride)
        peak, sums = tl.full((size,), -float("inf"), tl.float32), tl.zeros((size,), tl.float32)
        result = tl.zeros((size, dim_block), tl.float32)
        for start in range(first, end, size):
            columns = start + tl.arange(0, size)
            there = columns < end
            keys = load_rows(k + head * dim, columns, there, dims, dim, stride)
            scores = dot(queries, tl.trans(keys)) * scale
            own = rows[:, None] == columns[None, :]
            seen = tl.where(own, 1.0, _kept(kept, columns, there, skims)[None, :])
            scores = tl.where(there[None, :] & (seen > 0), scores + tl.log(tl.maximum(seen, 1e-30)), -float("inf"))
            higher = tl.maximum(peak, tl.max(scores, 1))
            # a block of keys that nobody sees leaves the peak at -inf
            shift = tl.where(higher == -float("inf"), 0.0, higher)
            weights, shrink = tl.exp(scores - shift[:, None]), tl.exp(peak - shift)
            sums = sums * shrink + tl.sum(weights, 1)
            if drops:
                weights *= _mask(seed, rows, columns, head, heads, rows_in_all, dropout)
            values = load_rows(v + head * dim, columns, there, dims, dim, stride)
            product = dot(weights.to(values.dtype), values)
            result, peak = result * shrink[:, None] + product, higher
        sums = tl.where(inside, sums, 1.0)
        store_rows(out + head * dim, result / sums[:, None], rows, inside, dims, dim, out_stride)
        tl.store(highest + rows * heads + head, peak, mask=inside)
        tl.store(total + rows * heads + head, peak + tl.log(sums), mask=inside)


@triton.jit
def _slopes(
    queries,
    keys,
    values,
    grads,
    peak,
    sums,
    inner,
    rows,
    columns,
    visible,
    head,
    heads,
    rows_in_all,
    scale,
    dropout,
    seed,
    drops: tl.constexpr,
):
    """W M and A of ``eager.py``, both ``[rows, columns]`` and 0 outside the sequence."""
    scores = dot(queries, tl.trans(keys)) * scale - sums[:, None]
    weights = tl.exp(tl.minimum(scores, (peak - sums)[:, None]))
    weights = tl.where(visible, weights, 0.0)
    products, dropped = dot(grads, tl.trans(values)), weights
    if drops:
        mask = _mask(seed, rows, columns, head, heads, rows_in_all, dropout)
        products, dropped = products * mask, weights * mask
    return dropped, weights * (products - inner[:, None])


@triton.jit
def _backward_query(
    q,
    k,
    v,
    kept,
    grad,
    highest,
    total,
    inner,
    q_grad,
    offsets,
    stride,
    out_stride,
    scale,
    heads,
    rows_in_all,
    dropout,
    seed,
    skims: tl.constexpr,
    drops: tl.constexpr,
    dim: tl.constexpr,
    dim_block: tl.constexpr,
    size: tl.constexpr,
):
    head, sequence = tl.program_id(1), tl.program_id(2)
    first, end = tl.load(offsets + sequence), tl.load(offsets + sequence + 1)
    rows, dims = first + tl.program_id(0) * size + tl.arange(0, size), tl.arange(0, dim_block)
    inside = rows < end
    if first + tl.program_id(0) * size < end:
        queries, grads = (
            load_rows(q + head * dim, rows, inside, dims, dim, stride),
            load_rows(grad + head * dim, rows, inside, dims, dim, out_stride),
        )
        peak, sums, inners = (
            tl.load(highest + rows * heads + head, mask=inside, other=0.0),
            tl.load(total + rows * heads + head, mask=inside, other=0.0),
            tl.load(inner + rows * heads + head, mask=inside, other=0.0),
        )
        result = tl.zeros((size, dim_block), tl.float32)
        for start in range(first, end, size):
            columns = start + tl.arange(0, size)
            there = columns < end
            keys, values = (
                load_rows(k + head * dim, columns, there, dims, dim, stride),
                load_rows(v + head * dim, columns, there, dims, dim, stride),
            )
            visible = inside[:, None] & there[None, :]
            _, slopes = _slopes(
                queries,
                keys,
                values,
                grads,
                peak,
                sums,
                inners,
                rows,
                columns,
                visible,
                head,
                heads,
                rows_in_all,
                scale,
                dropout,
                seed,
                drops,
            )
            own = rows[:, None] == columns[None, :]
            slopes *= tl.where(own, 1.0, _kept(kept, columns, there, skims)[None, :])
            result += dot(slopes.to(keys.dtype), keys)
        store_rows(q_grad + head * dim, result * scale, rows, inside, dims, dim, out_stride)


@triton.jit
def _backward_key(
    q,
    k,
    v,
    kept,
    grad,
    highest,
    total,
    inner,
    k_grad,
    v_grad,
    kept_grad,
    offsets,
    stride,
    out_stride,
    scale,
    heads,
    rows_in_all,
    dropout,
    seed,
    skims: tl.constexpr,
    drops: tl.constexpr,
    dim: tl.constexpr,
    dim_block: tl.constexpr,
    size: tl.constexpr,
):
    head, sequence = tl.program_id(1), tl.program_id(2)
    first, end = tl.load(offsets + sequence), tl.load(offsets + sequence + 1)
    columns, dims = first + tl.program_id(0) * size + tl.arange(0, size), tl.arange(0, dim_block)
    there = columns < end
    if first + tl.program_id(0) * size < end:
        keys, values = (
            load_rows(k + head * dim, columns, there, dims, dim, stride),
            load_rows(v + head * dim, columns, there, dims, dim, stride),
        )
        seen = _kept(kept, columns, there, skims)
        key_sum, value_sum = tl.zeros((size, dim_block), tl.float32), tl.zeros((size, dim_block), tl.float32)
        mask_sum = tl.zeros((size,), tl.float32)
        for start in range(first, end, size):
            rows = start + tl.arange(0, size)
            inside = rows < end
            queries, grads = (
                load_rows(q + head * dim, rows, inside, dims, dim, stride),
                load_rows(grad + head * dim, rows, inside, dims, dim, out_stride),
            )
            peak, sums, inners = (
                tl.load(highest + rows * heads + head, mask=inside, other=0.0),
                tl.load(total + rows * heads + head, mask=inside, other=0.0),
                tl.load(inner + rows * heads + head, mask=inside, other=0.0),
            )
            visible = inside[:, None] & there[None, :]
            dropped, slopes = _slopes(
                queries,
                keys,
                values,
                grads,
                peak,
                sums,
                inners,
                rows,
                columns,
                visible,
                head,
                heads,
                rows_in_all,
                scale,
                dropout,
                seed,
                drops,
            )
            own = rows[:, None] == columns[None, :]
            mask_sum += tl.sum(tl.where(own, 0.0, slopes), 0)
            by_key = tl.where(own, 1.0, seen[None, :])
            value_sum += dot(tl.trans((dropped * by_key).to(grads.dtype)), grads)
            key_sum += dot(tl.trans((slopes * by_key).to(queries.dtype)), queries)
        store_rows(k_grad + head * dim, key_sum * scale, columns, there, dims, dim, out_stride)
        store_rows(v_grad + head * dim, value_sum, columns, there, dims, dim, out_stride)
        if skims:
            tl.store(kept_grad + columns * heads + head, mask_sum, mask=there)


def _launch(query, lengths, dropout, seed):
    """The grid, and the arguments that all kernels share."""
    heads, dim = query.shape[1:]
    longest = max(lengths, default=0)
    size = max(16, min(ROWS, triton.next_power_of_2(max(longest, 1))))
    names = {
        "scale": dim**-0.5,
        "heads": heads,
        "rows_in_all": len(query),
        "dropout": dropout,
        "seed": seed,
        "drops": dropout > 0,
        "dim": dim,
        "dim_block": max(16, triton.next_power_of_2(dim)),
        "size": size,
    }
    return (triton.cdiv(longest, size), heads, len(lengths)), names


# operations of torch, so that a counter of FLOPs sees them
@torch.library.custom_op("fairseq_adaptive::skim_attention", mutates_args=())
def _run_forward(
    query: Tensor, key: Tensor, value: Tensor, kept: Optional[Tensor], offsets: Tensor, lengths: List[int],
    dropout: float, seed: int,
) -> Tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    out = torch.empty_like(value)
    highest, total = (torch.empty(query.shape[:2], dtype=torch.float32, device=query.device) for _ in range(2))
    grid, names = _launch(query, lengths, dropout, seed)
    if all(grid):
        _forward[grid](
            query,
            key,
            value,
            query if kept is None else kept,
            out,
            highest,
            total,
            offsets,
            query.stride(0),
            out.stride(0),
            skims=kept is not None,
            **names,
        )
    return out, highest, total


@torch.library.custom_op("fairseq_adaptive::skim_attention_backward", mutates_args=())
def _run_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, kept: Optional[Tensor], out: Tensor, highest: Tensor,
    total: Tensor, offsets: Tensor, lengths: List[int], dropout: float, seed: int,
) -> List[Tensor]:  # fmt: skip
    """Gradients of query, key and value, and of ``kept`` by heads, ``[R, H]``, which means nothing where it is None."""
    inner = (grad * out).sum(-1, dtype=torch.float32)  # R x H
    grads = [torch.empty_like(each) for each in (query, key, value, total)]
    grid, names = _launch(query, lengths, dropout, seed)
    if all(grid):
        inputs = (query, key, value, query if kept is None else kept, grad, highest, total, inner)
        strides, skims = (offsets, query.stride(0), grad.stride(0)), kept is not None
        _backward_query[grid](*inputs, grads[0], *strides, skims=skims, **names)
        _backward_key[grid](*inputs, *grads[1:], *strides, skims=skims, **names)
    return grads


def _products(shape, lengths):
    return 2 * shape[1] * shape[2] * sum(length**2 for length in lengths)


@register_flop_formula(torch.ops.fairseq_adaptive.skim_attention)
def _forward_flops(query, key, value, kept, offsets, lengths, *args, **kwargs):
    return 2 * _products(query, lengths)


@register_flop_formula(torch.ops.fairseq_adaptive.skim_attention_backward)
def _backward_flops(grad, query, key, value, kept, out, highest, total, offsets, lengths, *args, **kwargs):
    return 5 * _products(query, lengths)  # those that a backward pass needs, each once


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sequences: Sequences,
    kept: Optional[Tensor],
    dropout: float,
    seed: int,
    gradient: bool = True,
) -> Tuple[Tensor, Tensor, Tensor]:
    """As :func:`fairseq_adaptive.ops.skim_attention.eager.forward`; the two numbers of a row cost nothing here."""
    parts = (each if each is None else each.contiguous() for each in (query, key, value, kept))
    return _run_forward(*parts, sequences.offsets.to(query.device), sequences.lengths, dropout, seed)


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sequences: Sequences,
    kept: Optional[Tensor],
    dropout: float,
    seed: int,
    out: Tensor,
    highest: Tensor,
    total: Tensor,
) -> Tuple[Tensor, Tensor, Tensor, Optional[Tensor]]:
    """As :func:`fairseq_adaptive.ops.skim_attention.eager.backward`."""
    parts = (each if each is None else each.contiguous() for each in (grad, query, key, value, kept))
    where = sequences.offsets.to(query.device), sequences.lengths
    *grads, kept_grad = _run_backward(*parts, out, highest, total, *where, dropout, seed)
    return *grads, None if kept is None else kept_grad.sum(-1).to(kept.dtype)

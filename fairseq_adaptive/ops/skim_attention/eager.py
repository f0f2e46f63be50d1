"""Attention with skimmed tokens on torch's own kernels, a few sequences or heads at a time.

The scores of a whole batch would be written to memory and read from it a dozen times. Those of a piece stay in the
cache of the processor, and the backward pass computes them again from queries, keys and two numbers of every row.
"""

from typing import Iterator, Optional, Tuple

import torch
from torch import Tensor

from fairseq_adaptive.ops.matmul import products
from fairseq_adaptive.ops.random import CHOICES, kept_of, survivors
from fairseq_adaptive.ops.skim_attention.sequences import LARGEST, Piece, Sequences


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sequences: Sequences,
    kept: Optional[Tensor],
    dropout: float,
    seed: int,
    gradient: bool = True,
) -> Tuple[Tensor, Optional[Tensor], Optional[Tensor]]:
    """Return the output and, of every row and head, the highest score and the logarithm of the sum.

    With k_j = 1 at a kept key and 0 at a skimmed one, and S the scores::

        P_ij = exp(S_ij - L_i) k_j,  L_i = log sum_j exp(S_ij) k_j   where k_i counts as 1 in row i

    Args:
        query, key, value, kept, dropout: as for the definition in ``naive.py``
        sequences: which rows are a sequence
        seed: of the dropout
        gradient: whether there will be a backward pass

    Returns:
        ``[R, H, D]``, ``[R, H]`` and ``[R, H]``, the last two in at least float32, or None without a gradient
    """
    heads, exact = query.size(1), torch.promote_types(query.dtype, torch.float32)
    out = torch.empty_like(value, memory_format=torch.contiguous_format)
    highest, total = (query.new_empty(query.shape[:2], dtype=exact) if gradient else None for _ in range(2))
    for piece, some, masks in _parts(sequences, heads, dropout, seed):
        q, k, v = (_split(piece, each[:, some]) for each in (query, key, value))  # g x T x D, g = G heads
        bias = _bias(piece, kept, exact, q.size(0))
        scores = _scores(q, k, exact)
        if bias is not None:
            own = scores.diagonal(dim1=1, dim2=2).clone()  # a row sees its own key whatever is said of it
            scores.add_(bias).diagonal(dim1=1, dim2=2).copy_(own)
        peak = scores.amax(-1) if gradient else None
        weights = torch.softmax(scores, -1, out=scores)
        if gradient:
            # the highest weight is at least 1 / T
            _put(piece, peak - weights.amax(-1).log(), total, some)
            _put(piece, peak, highest, some)
        if dropout:
            weights.mul_(masks(weights))
        _put(piece, products(weights.to(value.dtype), v.transpose(1, 2)), out, some)
    return out, highest, total


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
    """Return the gradients of query, key, value and kept.

    With W_ij = exp(S_ij - L_i), which a skimmed key has too, though no more than the strongest kept one, M the mask of
    the dropout and G the gradient of the output::

        A_ij = W_ij (M_ij G_i . v_j - G_i . out_i)     is the gradient of k_j in row i, but for i = j
        A_ij k_j                                       that of S_ij

    so that only rows of keys, values and results are multiplied by k, and scores are written as seldom as can be.
    """
    heads, exact, scale = query.size(1), torch.promote_types(query.dtype, torch.float32), query.size(-1) ** -0.5
    grads = [torch.empty_like(each, memory_format=torch.contiguous_format) for each in (query, key, value)]
    kept_grad = None if kept is None else total.new_empty(total.shape)
    inner = (grad * out).sum(-1, dtype=exact)  # R x H
    for piece, some, masks in _parts(sequences, heads, dropout, seed):
        q, k, v, g = (_split(piece, each[:, some]) for each in (query, key, value, grad))
        shift, ours, peak = (_split(piece, each[:, some, None]) for each in (total, inner, highest))
        weights = _scores(q, k, exact).sub_(shift)
        padding = piece.padding()
        if kept is not None or padding is not None:
            weights.clamp_(max=peak - shift)  # no more than the strongest key that is seen
        weights.exp_()  # W
        if padding is not None:
            padding = padding.repeat_interleave(q.size(0) // piece.count, 0).unsqueeze(-1)
            g, ours = g.masked_fill(padding, 0), ours.masked_fill(padding, 0)
        slopes = products(g, v).to(exact)
        dropped = weights
        if dropout:
            mask = masks(weights)
            slopes.mul_(mask)
            dropped = weights * mask
        slopes.sub_(ours).mul_(weights)  # A
        dropped, half = dropped.to(q.dtype), slopes.to(q.dtype)
        by_key = None if kept is None and padding is None else _of_keys(piece, kept, q)
        value_grad, key_grad = _by_key(dropped, g), _by_key(half, q)
        query_grad = products(half, (k if by_key is None else k * by_key).transpose(1, 2))
        if by_key is not None:
            own, own_slope = (each.diagonal(dim1=1, dim2=2).unsqueeze(-1) * (1 - by_key) for each in (dropped, half))
            value_grad = value_grad * by_key + own * g
            key_grad = key_grad * by_key + own_slope * q
            query_grad = query_grad + own_slope * k
        if kept is not None:
            slopes.diagonal(dim1=1, dim2=2).zero_()
            _put(piece, slopes.sum(1), kept_grad, some)
        for each, whole, factor in zip((query_grad, key_grad, value_grad), grads, (scale, scale, 1.0)):
            _put(piece, each if factor == 1 else each * factor, whole, some)
    return *grads, None if kept is None else kept_grad.sum(-1).to(kept.dtype)


def _parts(sequences, heads, dropout, seed) -> Iterator:
    """Pieces, the heads that are computed at a time, and what draws the mask of the dropout, the same in every pass."""
    generator = torch.Generator().manual_seed(seed) if dropout else None
    for piece in sequences.pieces(heads):
        step = max(1, min(heads, LARGEST // (piece.count * piece.length**2)))
        for start in range(0, heads, step):

            def masks(weights):
                kept = kept_of(dropout)
                return survivors(weights.shape, kept, "cpu", generator).to(weights).mul_(1 / max(kept, 1 / CHOICES))

            yield piece, slice(start, start + step), masks


def _split(piece: Piece, x: Tensor) -> Tensor:
    """``[R, h, D]`` to ``[G h, T, D]``, contiguous: oneDNN crawls over rows that are far apart"""
    return piece.take(x).transpose(1, 2).contiguous().flatten(0, 1)


def _put(piece: Piece, x: Tensor, whole: Tensor, some: slice):
    """``[G h, T, ...]`` to its places in ``[R, H, ...]``"""
    piece.put(x.unflatten(0, (piece.count, -1)).transpose(1, 2), whole[:, some])


def _scores(q: Tensor, k: Tensor, exact: torch.dtype) -> Tensor:
    return products(q * q.size(-1) ** -0.5, k).to(exact)


def _by_key(weights: Tensor, x: Tensor) -> Tensor:
    """``[g, T, T]`` of rows and keys and ``[g, T, D]`` of rows to the sums of keys, ``[g, T, D]``."""
    return products(weights.transpose(1, 2), x.transpose(1, 2))


def _bias(piece: Piece, kept: Optional[Tensor], dtype: torch.dtype, rows: int) -> Optional[Tensor]:
    """``[G h, 1, T]``, to be added to the scores of keys: the logarithm of k, or None where all are kept."""
    padding = piece.padding()
    if kept is None and padding is None:
        return None
    k = torch.ones((), dtype=dtype) if kept is None else piece.take(kept).to(dtype)
    k = k if padding is None else torch.where(padding, torch.zeros((), dtype=dtype), k)
    return k.log().repeat_interleave(rows // piece.count, 0).unsqueeze(1)


def _of_keys(piece: Piece, kept: Optional[Tensor], like: Tensor) -> Tensor:
    """``[G h, T, 1]``: k, 0 at padding."""
    padding = piece.padding()
    k = like.new_ones((piece.count, piece.length)) if kept is None else piece.take(kept).to(like.dtype)
    k = k if padding is None else k.masked_fill(padding, 0)
    return k.repeat_interleave(like.size(0) // piece.count, 0).unsqueeze(-1)

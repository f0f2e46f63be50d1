"""Relative attention of some positions, at any places, without a gradient, in pieces whose scores stay in the cache."""

from typing import Optional

import torch
from torch import Tensor

from fairseq_adaptive.ops.matmul import products
from fairseq_adaptive.ops.registry import Op
from fairseq_adaptive.ops.relative_attention import eager

_FOLDER = "fairseq_adaptive.ops.relative_attention"
OP = Op("relative_attention_queries", {"triton": f"{_FOLDER}.triton:attend_from", "torch": f"{__name__}:attend_from"})


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    distances: Tensor,
    content_bias: Tensor,
    position_bias: Tensor,
    place: Tensor,
    window: Optional[int] = None,
    seen: Optional[Tensor] = None,
) -> Tensor:
    """As ``naive.py`` defines ``query_attention``, ``[H, G, Q, D]`` in the dtype of ``queries``; no gradient.

    Args:
        queries: ``[H, G, Q, D]``
        keys, values: ``[H, G, K, D]``
        distances: ``[H, K + 1, D]``
        content_bias, position_bias: ``[H, D]``
        place: ``[G, Q]``
        window: None: all keys so far
        seen: ``[G, K]``, or None
    """
    operands = queries, *(each.to(queries.dtype) for each in (keys, values, distances)), content_bias, position_bias
    run, device = OP.implementation(queries, queries.dtype), queries.device.type
    if not torch.is_autocast_enabled(device):
        return run(*operands, place, window, seen)
    with torch.autocast(device, enabled=False):
        return run(*operands, place, window, seen)


def attend_from(queries, keys, values, distances, content_bias, position_bias, place, window=None, seen=None):
    """:func:`attend` on torch's own kernels."""
    heads, groups, queried, _ = queries.shape
    length, limit = keys.size(2), eager.PIECE if queries.device.type == "cpu" else eager.DEVICE_PIECE
    out = queries.new_empty(groups, queried, heads, queries.size(3)).permute(2, 0, 1, 3)  # as is read after it
    if not queries.numel():
        return out
    biases = [eager.scaled(bias, queries) for bias in (content_bias, position_bias)]
    rows = max(1, limit // length)  # of scores together
    some = min(queried, rows)
    several = min(groups, max(1, rows // queried))
    many = min(heads, max(1, rows // (queried * groups)))
    for query in range(0, queried, some):
        for group in range(0, groups, several):
            there = slice(group, group + several), slice(query, query + some)
            hidden = _hidden(place[there], length, window, None if seen is None else seen[there[0]])
            for head in range(0, heads, many):
                where = slice(head, head + many)
                pair = where, there[0]
                out[(where, *there)] = _piece(
                    queries[(where, *there)],
                    keys[pair],
                    values[pair],
                    distances[where],
                    *(bias[where] for bias in biases),
                    place[there],
                    hidden,
                )
    return out


def _hidden(place, length, window, seen):
    """``[G, Q, K]``, true at the keys that queries must not see."""
    key, place = torch.arange(length, device=place.device), place.unsqueeze(-1)
    hidden = key > place
    if window is not None and window < length:
        hidden |= key <= place - window
    return hidden if seen is None else hidden | (~seen.bool().unsqueeze(1) & (key != place))


def _piece(queries, keys, values, distances, content_bias, position_bias, place, hidden):
    (heads, groups, queried, dim), length = queries.shape, keys.size(2)
    scale, count = dim**-0.5, groups * queried
    by_content = torch.add(content_bias, queries, alpha=scale).flatten(0, 1)
    # what is read behind the last row of a head is hidden, but must be there: one row more
    by_position = queries.new_zeros(heads, count + 1, dim)
    torch.add(position_bias, queries, alpha=scale, out=by_position[:, :count].unflatten(1, (groups, queried)))
    scores = products(by_position, distances)  # h x (g q + 1) x (K + 1), distances K to 0
    # a query at place p needs distance p at key 0, entry K - p of its row, and the K entries from there
    first = torch.arange(count, device=place.device) * (length + 1) + length - place.flatten()
    first = torch.arange(heads, device=place.device).unsqueeze(1) * ((count + 1) * (length + 1)) + first
    scores = scores.view(-1).unfold(0, length, 1).index_select(0, first.flatten()).view(-1, queried, length)
    scores = products(by_content, keys.flatten(0, 1), scores).view(heads, groups, queried, length)
    scores.masked_fill_(hidden, float("-inf"))
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(values.dtype)
    values = values.flatten(0, 1).transpose(1, 2)
    return products(weights.flatten(0, 1), values).view(heads, groups, queried, dim)

"""The definition of Transformer-XL's attention (Dai et al., 2019, section 3.3)."""

from typing import Optional

import torch
from torch import Tensor


def hidden_keys(queried: int, length: int, window: Optional[int] = None, device=None) -> Tensor:
    """True where a query must not see a key, ``[T, K]``: what comes after it, and what is ``window`` or more before."""
    distance = torch.arange(length - queried, length, device=device)[:, None] - torch.arange(length, device=device)
    hidden = distance < 0
    return hidden if window is None else hidden | (distance >= window)


def attention_weights(
    queries: Tensor,
    keys: Tensor,
    distances: Tensor,
    content_bias: Tensor,
    position_bias: Tensor,
    window: Optional[int] = None,
) -> Tensor:
    """How much each query attends to each key, ``[H, B, T, K]``, in float32 at least (:func:`relative_attention`)."""
    queried, length = queries.size(2), keys.size(2)
    by_content = torch.einsum("hbid,hbjd->hbij", queries + content_bias[:, None, None], keys)
    by_distance = torch.einsum("hbid,hnd->hbin", queries + position_bias[:, None, None], distances)
    row, column = torch.arange(queried)[:, None], torch.arange(length)
    # the last of the K + 1 distances is 0, and query i and key j are K - T + i - j apart
    place = (queried - row + column).clamp_(max=length).to(queries.device)
    by_position = by_distance.gather(-1, place.expand(*by_distance.shape[:-1], length))
    scores = (by_content + by_position) * queries.size(3) ** -0.5
    scores = scores.masked_fill(hidden_keys(queried, length, window, scores.device), float("-inf"))
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))


def relative_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    distances: Tensor,
    content_bias: Tensor,
    position_bias: Tensor,
    window: Optional[int] = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attend from each query to the keys at its place and before: ``[H, B, T, D]``.

    With u and v the content and the position bias, and R the projected encodings of distances::

        score_ij = [(q_i + u) . k_j + (q_i + v) . R_(i-j)] / sqrt(D)

    Args:
        queries: ``[H, B, T, D]``, those of the last T of K positions
        keys, values: ``[H, B, K, D]``
        distances: R, ``[H, K + 1, D]``, of the distances K to 0 in this order; no query is K away from a key
        content_bias, position_bias: ``[H, D]``
        window: each query sees this many keys, itself among them; None: all
        dropout: on the weights
    """
    weights = attention_weights(queries, keys, distances, content_bias, position_bias, window)
    return torch.nn.functional.dropout(weights.to(values.dtype), dropout) @ values


def query_attention(
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
    """:func:`relative_attention` of some positions, which may leave keys out: ``[H, G, Q, D]``.

    Args:
        queries: ``[H, G, Q, D]``
        keys, values: ``[H, G, K, D]``
        place: ``[G, Q]``, where each query is among the K positions
        seen: ``[G, K]``, false at keys that only a query at their own place sees; None: all are seen
        distances, content_bias, position_bias, window: of :func:`relative_attention`
    """
    length, key = keys.size(2), torch.arange(keys.size(2), device=place.device)
    apart = place.unsqueeze(-1) - key  # G x Q x K
    by_content = torch.einsum("hgqd,hgkd->hgqk", queries + content_bias[:, None, None], keys)
    by_distance = torch.einsum("hgqd,hnd->hgqn", queries + position_bias[:, None, None], distances)
    number = (length - apart).clamp(max=length)
    by_position = by_distance.gather(-1, number.expand(*by_content.shape))
    hidden = apart < 0
    if window is not None:
        hidden |= apart >= window
    if seen is not None:
        hidden |= ~seen.bool().unsqueeze(1) & (apart != 0)
    scores = ((by_content + by_position) * queries.size(3) ** -0.5).masked_fill(hidden, float("-inf"))
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(values.dtype) @ values

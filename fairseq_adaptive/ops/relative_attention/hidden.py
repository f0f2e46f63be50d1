"""Relative attention in which some keys are hidden, differentiable in who is: by autograd, with all scores in memory."""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_adaptive.ops.relative_attention.naive import hidden_keys


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    distances: Tensor,
    content_bias: Tensor,
    position_bias: Tensor,
    seen: Tensor,
    window: Optional[int] = None,
    dropout: float = 0.0,
) -> Tensor:
    """As ``naive.py`` defines ``query_attention`` of the last T places, ``[H, B, T, D]``.

    A weight is multiplied with how much its key is seen before weights are normalised, so that 0 and 1 hide and show.

    Args:
        queries: ``[H, B, T, D]``
        keys, values: ``[H, B, K, D]``
        distances: ``[H, K + 1, D]``
        content_bias, position_bias: ``[H, D]``
        seen: ``[B, K]``, 1 at keys that are seen and 0 at hidden ones, or booleans; with a gradient where it has one
        window, dropout: as of ``relative_attention``
    """
    (heads, batch, queried, dim), length = queries.shape, keys.size(2)
    scale = dim**-0.5
    by_position = ((queries + position_bias[:, None, None]) * scale).flatten(1, 2) @ distances.transpose(1, 2)
    # as in eager.py: one entry further to the left with each row
    by_position = by_position.view(heads * batch, -1)[:, queried:].view(heads, batch, queried, length)
    scores = (queries + content_bias[:, None, None]) * scale @ keys.transpose(2, 3) + by_position
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    own = (
        torch.arange(length, device=seen.device) == torch.arange(length - queried, length, device=seen.device)[:, None]
    )
    allowed = ~hidden_keys(queried, length, window, seen.device)
    if seen.requires_grad:
        seen = torch.where(own, torch.ones_like(scores[:1]), seen[:, None].to(scores)) * allowed  # 1 x B x T x K
        highest = scores.detach().masked_fill(seen == 0, float("-inf")).amax(-1, keepdim=True)
        weights = (scores - highest).clamp(max=0).exp() * seen
        weights = weights / weights.sum(-1, keepdim=True)
    else:
        weights = scores.masked_fill(~(((seen[:, None] > 0) | own) & allowed), float("-inf")).softmax(-1)
    return F.dropout(weights, dropout).to(values.dtype) @ values

"""Relative attention of one position, the last, without a gradient: mostly a matter of few calls."""

from typing import Optional

import torch
from torch import Tensor


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    distances: Tensor,
    content_bias: Tensor,
    position_bias: Tensor,
    seen: Optional[Tensor] = None,
) -> Tensor:
    """As ``naive.py`` defines it for T = 1, ``[H, B, 1, D]``; ``seen``, ``[B, K]``, is false at keys that are hidden
    from all but their own query, the last; None: all are seen."""
    heads, batch, _, dim = queries.shape
    scale = dim**-0.5
    by_position = (queries + position_bias[:, None, None]).view(heads, batch, dim)
    by_content = (queries + content_bias[:, None, None]).view(heads * batch, 1, dim)
    scores = torch.bmm(by_position, distances[:, 1:].transpose(1, 2)).view(heads * batch, 1, -1)
    keys = keys.flatten(0, 1).transpose(1, 2)
    scores = torch.baddbmm(scores, by_content, keys, beta=scale, alpha=scale)  # H B x 1 x K
    if seen is not None:
        scores.view(heads, batch, -1)[..., :-1].masked_fill_(~seen[:, :-1], float("-inf"))
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(values.dtype)
    return torch.bmm(weights, values.flatten(0, 1)).view(queries.shape)

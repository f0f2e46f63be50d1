"""Relative attention of some positions, at any places, without a gradient."""

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
    place: Tensor,
    window: Optional[int] = None,
) -> Tensor:
    """As ``naive.py`` defines it, of queries ``[H, G, Q, D]`` at ``place`` ``[G, Q]`` among the K positions."""
    heads, groups, queried, dim = queries.shape
    length, scale = keys.size(2), dim**-0.5
    column = torch.arange(length, device=place.device)
    apart = place.unsqueeze(-1) - column  # G x Q x K
    by_position = (queries + position_bias[:, None, None]).flatten(1, 2) @ distances.transpose(1, 2)
    index = (length - apart).clamp_(max=length).view(1, groups * queried, length).expand(heads, -1, -1)
    scores = by_position.gather(-1, index).view(heads * groups, queried, length)
    by_content = (queries + content_bias[:, None, None]).flatten(0, 1)
    scores = torch.baddbmm(scores, by_content, keys.flatten(0, 1).transpose(1, 2), beta=scale, alpha=scale)
    hidden = apart < 0 if window is None else (apart < 0) | (apart >= window)
    scores = scores.view(heads, groups, queried, length).masked_fill_(hidden, float("-inf"))
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(values.dtype)
    return weights @ values

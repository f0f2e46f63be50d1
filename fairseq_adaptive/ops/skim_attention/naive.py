"""The definition of self-attention in which some tokens are skimmed."""

from typing import Optional, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def masked_softmax(scores: Tensor, kept: Tensor) -> Tensor:
    """Softmax over the kept keys, differentiable in ``kept``.

    Equal to leaving skimmed keys out where ``kept`` is 0 or 1, but a skimmed key still tells the mask what it would
    have contributed. A skimmed query sees itself, so that no row is empty. The form is that of Rao et al., *DynamicViT*
    (NeurIPS 2021), equation 11, without its epsilon: the maximum is taken over the keys that are seen, which keeps
    the sum at 1 or above and the result exact. And a skimmed key promises at most the weight of the strongest kept one:
    the exact derivative, which knows no bound, makes the norm of a model's gradient some hundred times as large.

    Args:
        scores: ``[..., T, T]``
        kept: ``[..., T]``, from 0 to 1

    Returns:
        ``[..., T, T]`` in at least single precision
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    keys = kept.to(scores).unsqueeze(-2)
    keys = keys + (1 - keys) * torch.eye(scores.size(-1), dtype=scores.dtype, device=scores.device)  # ... x T x T
    highest = scores.detach().masked_fill(keys == 0, float("-inf")).amax(-1, keepdim=True)
    exponentials = (scores - highest).clamp(max=0).exp() * keys
    return exponentials / exponentials.sum(-1, keepdim=True)


def skim_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Sequence[int],
    kept: Optional[Tensor] = None,
    dropout: float = 0.0,
) -> Tensor:
    """Return ``[R, H, D]``: each row attends to the kept rows of its sequence and to itself.

    Args:
        query, key, value: ``[R, H, D]``, the rows of one sequence after those of another
        lengths: how many rows each sequence has, R in all
        kept: ``[R]``, 1 where a row is kept and 0 where it is skimmed; None: all are kept
        dropout: probability of leaving out a weight
    """
    kept = torch.ones(len(query), device=query.device) if kept is None else kept
    outputs = [value[:0]]
    for *parts, mask in zip(*(each.split(list(filter(None, lengths))) for each in (query, key, value, kept))):
        q, k, v = (each.transpose(0, 1) for each in parts)  # H x T x D
        weights = masked_softmax(q @ k.transpose(1, 2) * q.size(-1) ** -0.5, mask)
        outputs.append((F.dropout(weights, dropout).to(v.dtype) @ v).transpose(0, 1))
    return torch.cat(outputs)

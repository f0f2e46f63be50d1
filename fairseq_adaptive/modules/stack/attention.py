"""fairseq's attention over some tokens, or over keys of which some are hidden."""

from typing import Callable, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_adaptive.modules.layers.int8_linear import project
from fairseq_adaptive.modules.stack.packing import Groups
from fairseq_adaptive.ops.skim_attention import Sequences, skim_attention


def heads(x: Tensor, attention) -> Tensor:
    """B x S x C -> B x H x S x D"""
    return x.unflatten(-1, (attention.num_heads, attention.head_dim)).transpose(1, 2)


def attend_from(attention, x: Tensor, groups: Groups, keys: Tensor, values: Tensor, mask: Optional[Tensor]) -> Tensor:
    """P x C over G x H x S x D; ``mask`` is G x 1 x (1 or Q) x S, true at the keys to see."""
    queries = heads(groups.pad(attention.q_proj(x)), attention)
    out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
    return attention.out_proj(groups.unpad(out.transpose(1, 2).flatten(2)))


def attend_within(
    attention, sequences: Sequences, x: Tensor, kept: Optional[Tensor] = None, keys: Optional[Callable] = None
) -> Tensor:
    """Self-attention of packed tokens that leaves skimmed ones out, differentiable in ``kept``.

    Args:
        attention: fairseq's multi-head attention
        sequences: which tokens are a sequence
        x: P x C
        kept: P, 1 where the others see a token and 0 where they do not; None: all are seen
        keys: makes of keys and values, P x C, those that are read

    Returns:
        P x C
    """
    queries, *pair = project(x, attention.q_proj, attention.k_proj, attention.v_proj)
    pair = pair if keys is None else keys(*pair)
    parts = (each.unflatten(-1, (attention.num_heads, attention.head_dim)) for each in (queries, *pair))
    dropout = attention.dropout_module.p if attention.training else 0.0
    return attention.out_proj(skim_attention(*parts, sequences, kept, dropout).flatten(1))


def log_sizes(size: Tensor) -> Tensor:
    """G x S, for how many tokens each key stands (0: nobody sees it), to what is added to its scores, G x 1 x 1 x S."""
    nobody = ~(size > 0).any(1, keepdim=True)  # where nothing is seen, and nothing is wanted: no NaN
    return size.log().masked_fill(nobody, 0.0)[:, None, None]


def attend_sized(attention, x: Tensor, groups: Groups, size: Tensor, keys: Optional[Callable] = None) -> Tensor:
    """Self-attention of packed tokens in which a key counts as often as it stands for tokens (Bolya et al., 2023).

    Args:
        attention: fairseq's multi-head attention
        x: P x C
        groups: of their sequences
        size: P, for how many tokens each stands; 0: nobody sees it
        keys: makes of keys and values, P x C, those that are read

    Returns:
        P x C
    """
    queries, *pair = project(x, attention.q_proj, attention.k_proj, attention.v_proj)
    pair = pair if keys is None else keys(*pair)
    q, k, v = (heads(groups.pad(each), attention) for each in (queries, *pair))
    mask = log_sizes(groups.pad(size)).to(q.dtype)
    dropout = attention.dropout_module.p if attention.training else 0.0
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    return attention.out_proj(groups.unpad(out.transpose(1, 2).flatten(2)))


def attend_padded(
    attention, x: Tensor, visible: Optional[Tensor], causal: bool, keys: Optional[Callable] = None
) -> Tensor:
    """Self-attention of a dense run in which some keys are hidden, differentiable in who is.

    Every query sees itself: what is hidden makes no NaN, and is not used.

    Args:
        attention: fairseq's multi-head attention
        x: T x B x C
        visible: T x B, 1 where the keys of a token are seen and 0 where they are not; None: all are
        causal: a token sees itself and those before it
        keys: makes of keys and values, T x B x C, those that are read

    Returns:
        T x B x C
    """
    queries, *pair = project(x, attention.q_proj, attention.k_proj, attention.v_proj)
    pair = pair if keys is None else keys(*pair)
    q, k, v = (heads(each.transpose(0, 1), attention) for each in (queries, *pair))
    place = torch.arange(x.size(0), device=x.device)
    own = place == place[:, None]
    allowed = torch.ones_like(own).tril() if causal else torch.ones_like(own)
    seen = visible.t()[:, None, None] if visible is not None else torch.ones_like(own[:1])
    dropout = attention.dropout_module.p if attention.training else 0.0
    if seen.requires_grad:
        scores = q @ k.transpose(2, 3) * q.size(-1) ** -0.5
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        seen = torch.where(own, torch.ones_like(scores[:, :1]), seen.to(scores)) * allowed
        highest = scores.detach().masked_fill(seen == 0, float("-inf")).amax(-1, keepdim=True)
        weights = (scores - highest).clamp(max=0).exp() * seen
        weights = weights / weights.sum(-1, keepdim=True)
        out = F.dropout(weights, dropout).to(v.dtype) @ v
    else:
        mask = ((seen > 0) | own) & allowed
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    return attention.out_proj(out.transpose(1, 2).flatten(2).transpose(0, 1))

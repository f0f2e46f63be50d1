"""A run of the stack in which tokens are skimmed: dense for training, packed for inference.

A dense run computes every token at every depth and masks what has been skimmed. A packed run takes the padding away
once, drops skimmed tokens as it goes, and puts every token's last state back once. On the same decisions they give
states that are equal up to rounding, at any batch size and padding.
"""

import functools
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_adaptive.modules.packing import Groups, token_mask
from fairseq_adaptive.modules.skimming import masked_attention
from fairseq_adaptive.modules.trace import Step, Trace


def skim_dense(stack, x: Tensor, padding_mask: Optional[Tensor], protected: Optional[Tensor]) -> Tensor:
    """Run all tokens at every depth.

    Args:
        stack: a :class:`~fairseq_adaptive.modules.LayerStack` with a router
        x: T x B x C
        padding_mask: B x T, true at padding
        protected: B x T, true at tokens that must not be skimmed

    Returns:
        T x B x C, of every token the output of the last layer that kept it
    """
    trace = Trace(token_mask(x, padding_mask), len(stack))
    kept = trace.tokens.to(x)
    profiling = stack.training and stack.residual is not None and not stack.residual.profiled
    for depth in range(len(stack)):
        decision, probability = stack.router.decide(depth, x.transpose(0, 1), protected)
        kept = kept.to(decision) * decision
        layer = stack[depth]
        attend = functools.partial(masked_attention, layer.self_attn, kept)
        after = layer(x, padding_mask, depth=depth, residual=stack.residual, self_attention=attend)
        gate = kept.transpose(0, 1).unsqueeze(-1).to(x)
        x = after * gate + x * (1 - gate)
        trace.steps.append(Step(stack.schedule[depth], kept > 0, kept=kept, probability=probability))
    if profiling:
        stack.residual.finish_profiling()
    stack.record(trace)
    return x


def skim_packed(stack, x: Tensor, padding_mask: Optional[Tensor], protected: Optional[Tensor]) -> Tensor:
    """Run only what is kept; for inference. Arguments and result are those of :func:`skim_dense`."""
    tokens = token_mask(x, padding_mask)
    batch, length = tokens.shape
    trace = Trace(tokens, len(stack))
    result = x.transpose(0, 1).reshape(batch * length, -1)
    rows, groups = tokens.flatten().nonzero().squeeze(1), None
    state = result.index_select(0, rows)
    result = result.clone() if result.data_ptr() == x.data_ptr() else result
    for depth in range(len(stack)):
        if not rows.numel():
            break
        at = None if protected is None else protected.flatten().index_select(0, rows)
        decision, probability = stack.router.decide(depth, state, at)
        if stack.recorder is not None:
            kept, probabilities = (probability.new_zeros(batch * length) for _ in range(2))
            kept[rows], probabilities[rows] = decision.to(kept), probability
            kept, probabilities = kept.view(batch, length), probabilities.view(batch, length)
            step = Step(stack.schedule[depth], kept > 0, kept=kept, probability=probabilities)
            trace.steps.append(step)
        decision = decision.bool()
        staying = decision.nonzero().squeeze(1)
        if staying.numel() < rows.numel():
            leaving = (~decision).nonzero().squeeze(1)
            result.index_copy_(0, rows[leaving], state.index_select(0, leaving))
            rows, state, groups = rows[staying], state.index_select(0, staying), None
            if not rows.numel():
                break
        groups = groups or Groups(rows.div(length, rounding_mode="floor"), batch)
        layer = stack[depth]
        attend = functools.partial(_attend, layer.self_attn, groups)
        state = layer(state, depth=depth, residual=stack.residual, self_attention=attend)
    result.index_copy_(0, rows, state)
    stack.record(trace)
    return result.view(batch, length, -1).transpose(0, 1)


def _attend(attention, groups: Groups, x: Tensor) -> Tensor:
    """R x C -> R x C, each row over the rows of its sequence."""

    def heads(x):
        return groups.pad(x).unflatten(-1, (attention.num_heads, attention.head_dim)).transpose(1, 2)  # G x H x Q x D

    queries, keys, values = (heads(project(x)) for project in (attention.q_proj, attention.k_proj, attention.v_proj))
    mask = groups.pad(x.new_ones(x.size(0), dtype=torch.bool))[:, None, None]
    out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=None if mask.all() else mask)
    return attention.out_proj(groups.unpad(out.transpose(1, 2).flatten(2)))

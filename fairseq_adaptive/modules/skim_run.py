"""A run of the stack in which tokens are skimmed: dense for training, packed for inference.

Both take the padding away once and put every token's last state back once. A dense run computes every token at every
depth and masks what has been skimmed; a packed run drops it. On the same decisions they give states that are equal up
to rounding, at any batch size and padding.
"""

import functools
from typing import Optional

import torch
from torch import Tensor

from fairseq_adaptive.modules.packing import Rows, token_mask
from fairseq_adaptive.modules.skimming import attend
from fairseq_adaptive.modules.trace import Step, Trace
from fairseq_adaptive.ops.skim_attention import Sequences


def skim_dense(
    stack, x: Tensor, padding_mask: Optional[Tensor], protected: Optional[Tensor], tape_len: int = 0
) -> Tensor:
    """Run all tokens at every depth.

    Args:
        stack: a :class:`~fairseq_adaptive.modules.LayerStack` with a router
        x: T x B x C
        padding_mask: B x T, true at padding
        protected: B x T, true at tokens that must not be skimmed
        tape_len: how many states at the end are tape tokens

    Returns:
        T x B x C, of every token the output of the last layer that kept it
    """
    rows = Rows(token_mask(x, padding_mask))
    sequences, trace = rows.sequences(), Trace(rows.tokens, len(stack))
    state, protected = rows.take(x.transpose(0, 1)), None if protected is None else rows.take(protected)
    kept = state.new_ones(state.size(0))
    where = {}
    if tape_len:
        tape = torch.arange(x.size(0), device=x.device) >= x.size(0) - tape_len
        where["tape"] = rows.take(tape.expand_as(rows.tokens))
    profiling = stack.training and stack.residual is not None and not stack.residual.profiled
    for depth in range(len(stack)):
        decision, probability = stack.router.decide(depth, state, protected)
        kept = kept.to(decision) * decision
        layer = stack[depth]
        attention = functools.partial(attend, layer.self_attn, sequences, kept=kept)
        after = layer(state, depth=depth, residual=stack.residual, self_attention=attention, **where)
        gate = kept.unsqueeze(-1).to(state)
        state = after * gate + state * (1 - gate)
        step = Step(stack.schedule[depth], rows.put(kept > 0), kept=rows.put(kept), probability=rows.put(probability))
        trace.steps.append(step)
    if profiling:
        stack.residual.finish_profiling()
    stack.record(trace, tape_len)
    return rows.put(state, x.transpose(0, 1)).transpose(0, 1)


def skim_packed(
    stack, x: Tensor, padding_mask: Optional[Tensor], protected: Optional[Tensor], tape_len: int = 0
) -> Tensor:
    """Run only what is kept; for inference. Arguments and result are those of :func:`skim_dense`."""
    tokens = token_mask(x, padding_mask)
    batch, length = tokens.shape
    trace = Trace(tokens, len(stack))
    rows, sequences = tokens.flatten().nonzero().squeeze(1), None
    result = x.transpose(0, 1).clone(memory_format=torch.contiguous_format).flatten(0, 1)
    state = result.index_select(0, rows)
    protected = None if protected is None else protected.flatten().index_select(0, rows)
    for depth in range(len(stack)):
        if not rows.numel():
            break
        decision, probability = stack.router.decide(depth, state, protected, stack.recorder is not None)
        if stack.recorder is not None:
            kept, probabilities = (
                probability.new_zeros(batch * length).index_copy_(0, rows, each.to(probability)).view(batch, length)
                for each in (decision, probability)
            )
            step = Step(stack.schedule[depth], kept > 0, kept=kept, probability=probabilities)
            trace.steps.append(step)
        staying = decision.nonzero().squeeze(1)
        if staying.numel() < rows.numel():
            result.index_copy_(0, rows, state)
            rows, state, sequences = rows.index_select(0, staying), state.index_select(0, staying), None
            protected = None if protected is None else protected.index_select(0, staying)
            if not rows.numel():
                break
        sequences = sequences or Sequences(rows.div(length, rounding_mode="floor").bincount(minlength=batch))
        layer = stack[depth]
        attention = functools.partial(attend, layer.self_attn, sequences)
        where = {"tape": rows % length >= length - tape_len} if tape_len else {}
        state = layer(state, depth=depth, residual=stack.residual, self_attention=attention, **where)
    result.index_copy_(0, rows, state)
    stack.record(trace, tape_len)
    return result.view(batch, length, -1).transpose(0, 1)


def keep_all(stack, x: Tensor, padding_mask: Optional[Tensor]) -> Tensor:
    """Run all tokens at every depth of a stack that has no router; padding costs nothing.

    Args:
        stack: a :class:`~fairseq_adaptive.modules.LayerStack` that tells its layers the depth
        x: T x B x C
        padding_mask: B x T, true at padding

    Returns:
        T x B x C
    """
    rows = Rows(token_mask(x, padding_mask))
    sequences, state = rows.sequences(), rows.take(x.transpose(0, 1))
    for layer in stack:
        state = layer(state, self_attention=functools.partial(attend, layer.func.self_attn, sequences))
    return rows.put(state, x.transpose(0, 1)).transpose(0, 1)


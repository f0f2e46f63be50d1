"""A run of the stack in which tokens halt: dense for training, packed for inference.

A dense run computes every token at every depth and masks what has halted. A packed run computes running tokens only.
They give the same updates, and states that are equal up to rounding.
"""

from typing import Callable, Optional, Tuple

import torch
from torch import Tensor

from fairseq_adaptive.modules.packing import Groups, token_mask
from fairseq_adaptive.modules.trace import Step, Trace


def run_dense(
    stack, x: Tensor, padding_mask: Optional[Tensor], call: Callable, tape_len: int = 0
) -> Tuple[Tensor, Optional[Tensor]]:
    """Run all tokens at every depth until all have halted.

    Args:
        stack: a :class:`~fairseq_adaptive.modules.LayerStack` with a halting rule
        x: T x B x C
        padding_mask: B x T, true at padding, which has halted from the start
        call: ``call(layer, x, depth)`` returns T x B x C and attention weights (... x B x T x S) or None
        tape_len: how many states at the end are tape tokens

    Returns:
        T x B x C and the weights of every token at its last depth; T x (N B) x C where ``stack.every_depth`` is set and
        the rule weighs depths: the states of all depths, one after the other
    """
    rule, depths = stack.halting, len(stack)
    trace = Trace(token_mask(x, padding_mask), depths)
    running = trace.tokens.transpose(0, 1)
    carry, states, weights = rule.start(x), [], None
    profiling = stack.training and stack.residual is not None and not stack.residual.profiled
    # a layer that some worker leaves out of a training step would have no gradient there
    least = depths if profiling else max(map(stack.schedule.index, stack.schedule)) + 1 if stack.training else 1
    for depth in range(depths):
        alive = running
        after, new = call(stack[depth], x, depth)
        x, carry, running, probability = rule.step(x, after, carry, alive, depth == depths - 1)
        if new is not None:
            weights = new if weights is None else torch.where(alive.transpose(0, 1).unsqueeze(-1), new, weights)
        step = (each.transpose(0, 1) for each in (alive, alive & ~running, probability))
        alive, halted, probability = step
        trace.steps.append(Step(stack.schedule[depth], alive, halted=halted, probability=probability))
        states.append(x if stack.every_depth and rule.weighs_depths else None)
        if depth + 1 >= least and not running.any():
            break
    if profiling:
        stack.residual.finish_profiling()
    if rule.weighs_depths:
        trace.distribution = torch.stack([step.probability for step in trace.steps])
    if "remainders" in carry:
        trace.remainders = carry["remainders"].transpose(0, 1)
    stack.record(trace, tape_len)
    if states[0] is not None:
        return torch.cat(states, 1), weights
    return rule.output(x, carry), weights


def run_packed(
    stack, x: Tensor, padding_mask: Optional[Tensor], self_attention, cross_attention=None, tape_len: int = 0
) -> Tensor:
    """Run only what has not halted; for inference.

    Args:
        stack: a :class:`~fairseq_adaptive.modules.LayerStack` with a halting rule
        x: T x B x C
        padding_mask: B x T, true at padding, which has halted from the start
        self_attention: ``self_attention(states, tokens)`` builds a
            :class:`~fairseq_adaptive.modules.packed_attention.PackedSelfAttention`
        cross_attention: a :class:`~fairseq_adaptive.modules.packed_attention.PackedCrossAttention`
        tape_len: how many states at the end are tape tokens

    Returns:
        T x B x C
    """
    rule, depths, tokens = stack.halting, len(stack), token_mask(x, padding_mask)
    batch, length = tokens.shape
    states = x.transpose(0, 1).reshape(batch * length, -1).clone()
    result, remainders = states.clone(), None
    attention = self_attention(states, tokens)
    trace = Trace(tokens, depths)
    rows = tokens.flatten().nonzero().squeeze(1)
    state = states.index_select(0, rows)
    carry, groups = rule.start(state), None
    if "remainders" in carry:
        remainders = carry["remainders"].new_zeros(batch * length)
    for depth in range(depths):
        if not rows.numel():
            break
        number, layer, last = stack.schedule[depth], stack[depth], depth == depths - 1
        groups = groups or Groups(rows.div(length, rounding_mode="floor"), batch)
        where = {"self_attention": lambda x: attention(x, number, layer, depth, rows, groups)}
        if cross_attention is not None:
            where["cross_attention"] = lambda x: cross_attention(x, layer, rows)
        if tape_len:
            where["tape"] = rows % length >= length - tape_len
        after = layer(state, depth=depth, residual=stack.residual, **where)
        after = after[0] if isinstance(after, tuple) else after
        everyone = torch.ones_like(rows, dtype=torch.bool)
        state, carry, running, probability = rule.step(state, after, carry, everyone, last)
        states.index_copy_(0, rows, state)
        attention.changed(rows)
        if stack.recorder is not None:
            alive, halted = (tokens.new_zeros(batch * length) for _ in range(2))
            alive[rows], halted[rows] = True, ~running
            all_probabilities = probability.new_zeros(batch * length).index_copy_(0, rows, probability)
            step = (each.view(batch, length) for each in (alive, halted, all_probabilities))
            alive, halted, all_probabilities = step
            trace.steps.append(Step(number, alive, halted=halted, probability=all_probabilities))
        goes_on = running if not last else torch.zeros_like(running)
        keep = goes_on.nonzero().squeeze(1)
        if keep.numel() == rows.numel():
            continue
        done = (~goes_on).nonzero().squeeze(1)
        stopped = {name: each.index_select(0, done) for name, each in carry.items()}
        result.index_copy_(0, rows[done], rule.output(state.index_select(0, done), stopped))
        if remainders is not None:
            remainders.index_copy_(0, rows[done], stopped["remainders"])
        rows, state, groups = rows[keep], state.index_select(0, keep), None
        carry = {name: each.index_select(0, keep) for name, each in carry.items()}
    trace.remainders = None if remainders is None else remainders.view(batch, length)
    attention.finish(stack)
    stack.record(trace, tape_len)
    return result.view(batch, length, -1).transpose(0, 1)

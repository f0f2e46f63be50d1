"""The two runs of a stack: dense for training, packed for inference.

At each depth a reader may add tokens, a router may say who is computed, before the layer, and a halting rule who is
done, after it; all three are optional, and go together. A token is running, left out at this depth, or done. A dense
run computes every token and masks; a packed run computes running tokens only. On the same decisions they give states
that are equal up to rounding.
"""

from typing import List, Optional

import torch
from torch import Tensor

from fairseq_adaptive.modules.policies.base import Choice, where_token
from fairseq_adaptive.modules.stack.context import ALL, Context, Shown, every_state
from fairseq_adaptive.modules.stack.every_state import taker
from fairseq_adaptive.modules.stack.merges import Merges
from fairseq_adaptive.modules.stack.packed_context import PackedContext
from fairseq_adaptive.modules.stack.trace import Step, Trace, dense_step


def _merged(carry, new, merge):
    return {name: merge(each, new[name]) for name, each in carry.items()}


def _at(carry, places):
    return {name: each.index_select(0, places) for name, each in carry.items()}


def run_dense(
    stack, context: Context, protected: Optional[Tensor] = None, states: Optional[List[Tensor]] = None
) -> Tensor:
    """Run all tokens at every depth until all have halted.

    Args:
        stack: a :class:`~fairseq_adaptive.modules.LayerStack`
        context: where the tokens lie; it is changed where a reader reads, see ``context.read``
        protected: B x T, true at tokens that a router must not leave out
        states: takes the states after each depth, where they are wanted

    Returns:
        the states in the layout that the context was given; with those of all depths, one after the other in the batch,
        where ``stack.every_depth`` is set and the rule weighs depths
    """
    if not stack.adaptive and stack.recorder is None and context.reading is None:
        return _run_plain(stack, context, states)
    rule, router, depths, end = stack.halting, stack.router, len(stack), context
    trace = None if stack.recorder is None else Trace(context.tokens, depths, most=len(stack.halting_depths))
    x, running, weights, kept, missed = context.start, context.running, None, None, None
    done = None if rule is None and router is None else torch.zeros_like(running)
    protected = None if protected is None or router is None else context.take(protected)
    carry, routed = {} if rule is None else rule.start(x), {} if router is None else router.start(x)
    if rule is not None and rule.reads_position:
        carry["position"] = context.position(stack)
    began = x  # the states when the rule was asked last
    weighs = rule is not None and rule.weighs_depths
    every: Optional[List[Tensor]] = [] if stack.every_depth and weighs else None
    merges, stood = Merges(context.tokens) if stack.merges else None, []  # stood: at each of every state

    def finish(x):
        return end.finish(x) if merges is None else merges.spread(end.finish(x))

    # a layer that some worker leaves out of a training step would have no gradient there; a router has one each depth
    least = max(map(stack.schedule.index, stack.schedule)) + 1 if stack.training else 1
    least = depths if stack.profiling or context.runs_all or (router is not None and stack.training) else least
    going, taken = stack.depths(), taker(stack)
    for depth in range(depths):
        if end.reads_at(depth):
            at_once = began is x
            end, new, merge = end.extend(stack, x)
            x = end.start
            began = x if at_once else merge(began, new)
            every = every and [merge(each, new) for each in every]  # what reads later has been so far as it is read
            if merges is not None:
                merges, *stood = (each.extend(end.tape_len) for each in (merges, *stood))
            if done is not None:
                live = end.take(end.read.live) if new.dim() > 2 else torch.ones_like(new[..., 0], dtype=torch.bool)
                nothing = torch.zeros_like(live)
                running, done = merge(running, live), merge(done, nothing)
                carry = carry and _merged(carry, rule.start(new), merge)
                routed = routed and _merged(routed, router.start(new), merge)
                kept = None if kept is None else merge(kept, torch.ones_like(live).to(kept))
                missed = None if missed is None else merge(missed, nothing)
                protected = None if protected is None else merge(protected, nothing)
            else:
                running = end.running
            if trace is not None:
                trace.extend(end.read)
        if depth not in going:
            end.skip(stack, depth, x)
            if taken is not None:
                taken.append(finish(x))
            continue
        before, alive, was_done, asked, choice, halting = x, running, done, running, None, None
        if router is not None:
            choice = router.choose(depth, x, routed, asked, end.sentence, protected, end.causal)
            routed = routed if choice.carry is None else choice.carry
            open_to = torch.ones_like(choice.run) if kept is None or not router.monotone else kept
            kept = torch.where(done, open_to, open_to * choice.run)  # who has halted is not asked, and seen as it was
            choice = choice._replace(run=kept, carry=routed)
            if choice.merged is not None:
                began = choice.merged.state if began is x else began
                before = x = choice.merged.state
                merges = merges.add(end.take(merges.numbers).flatten(), choice.merged.into.flatten())
            alive = running & (kept > 0)
            left = running & ~alive
            missed = left if missed is None else missed | left
            running = alive if router.monotone else running
        shown = _shown(stack, kept, done, before, choice)
        x, new = end.call(stack, depth, before, shown)
        if router is not None:
            x = router.combine(before, x, choice)
        if rule is not None:
            mixed, going_on = x, alive
            if depth in stack.halting_depths:
                x, carry, going_on, halting = rule.step(began, mixed, carry, alive, depth == depths - 1)
            if halting is None or (router is not None and began is not before):  # as they were before this depth
                x = where_token(alive, x, before)
            if kept is not None and kept.requires_grad:  # the rule stops the gradient of having left a token out
                x = torch.where((alive | was_done).unsqueeze(-1), x, mixed)
            done = done | (alive & ~going_on)
            running = going_on if router is None or router.monotone else going_on | left
            began = began if halting is None else x
        if new is not None and done is not None:
            new = torch.where(end.put(alive).unsqueeze(-1), new, torch.zeros_like(new) if weights is None else weights)
        weights = weights if new is None else new
        if trace is not None:
            trace.steps.append(dense_step(stack, end, depth, alive, asked, kept, was_done, done, choice, halting))
            if halting is not None and "said" in carry:
                trace.steps[-1].said = end.put(carry["said"])
        if every is not None and halting is not None:
            every.append(x)
            stood += [] if merges is None else [merges]
        for wanted in (states, taken):
            if wanted is not None:
                wanted.append(finish(x))
        if rule is not None and least <= depth + 1 < depths and not end.reads_after(depth) and not running.any():
            kept = kept if router is None or router.monotone else torch.ones_like(kept)  # who has halted is not asked
            for rest in range(depth + 1, depths):
                end.skip(stack, rest, x, _shown(stack, kept, done, x))
            break
    stack.finish_profiling()
    context.read, context.weights = end.read, weights
    if trace is not None:
        if weighs:
            trace.distribution = torch.stack([step.probability for step in trace.steps if step.counts])
            if missed is not None:  # the rest is the last state's
                rest = (1 - trace.distribution.sum(0)) * end.put(missed)
                trace.distribution = torch.cat((trace.distribution[:-1], trace.distribution[-1:] + rest))
        if "remainders" in carry:
            trace.remainders = end.put(carry["remainders"])
        stack.record(trace, end.tape_len)
    if every is not None:
        return every_state(end, every, stood)
    if rule is not None:
        x = rule.output(x, carry, None if missed is None else done | ~missed)
    return finish(x)


def _run_plain(stack, context, states):
    """All tokens at all depths, and nobody asks: at one token at a time the Python around a layer is felt."""
    x, weights, going, taken = context.start, None, stack.depths(), taker(stack)
    for depth in range(len(stack)):
        if depth in going:
            x, new = context.call(stack, depth, x)
            weights = weights if new is None else new
            if states is not None:
                states.append(context.finish(x))
        else:
            context.skip(stack, depth, x)
        if taken is not None:
            taken.append(context.finish(x))
    stack.finish_profiling()
    context.weights = weights
    return context.finish(x)


def _shown(stack, kept, done, x, choice=None):
    """What is seen at a depth of the tokens that are not computed there, and for how many tokens each stands."""
    if not stack.hides and stack.kv == "recompute":
        return ALL
    visible = kept if stack.router is not None and stack.router_kv == "active" else None
    if stack.halting is not None and stack.halting_kv == "active":
        visible = (~done).to(x) if visible is None else visible.masked_fill(done, 0.0)
    merged = None if choice is None else choice.merged
    return Shown(visible, done, None if merged is None else merged.size)


def run_packed(stack, context: PackedContext, protected: Optional[Tensor] = None) -> Tensor:
    """Run only what is computed; for inference. Arguments and result are those of :func:`run_dense`."""
    rule, router, depths = stack.halting, stack.router, len(stack)
    trace = None if stack.recorder is None else Trace(context.tokens, depths, most=len(stack.halting_depths))
    result = context.states.clone() if context.remembers or context.reading is not None else context.states
    places = context.tokens.flatten().nonzero().squeeze(1)
    state = result.index_select(0, places)
    carry, routed = {} if rule is None else rule.start(state), {} if router is None else router.start(state)
    if rule is not None and rule.reads_position:
        carry["position"] = context.position(stack, places)
    began = None if rule is None or len(stack.halting_depths) == depths else state  # when the rule was asked last
    protected = None if protected is None or router is None else protected.flatten().index_select(0, places)
    missed = None if rule is None or router is None or router.monotone else torch.zeros_like(places, dtype=torch.bool)
    remainders = carry["remainders"].new_zeros(len(result)) if "remainders" in carry else None
    merges = Merges(context.tokens) if stack.merges else None

    def put(values, at):
        return values.new_zeros(len(result)).index_copy_(0, at, values).view(context.tokens.shape)

    def leave(stay, kv, finished):
        """Take the tokens that do not stay out of the run; the others go on seeing them, or not."""
        nonlocal places, state, carry, routed, protected, missed, began
        all_of_them, stay = stay, stay.nonzero().squeeze(1)
        if stay.numel() == places.numel():
            return
        if rule is None and not (kv and context.remembers):  # who stays is written, too: cheaper than to find who goes
            result.index_copy_(0, places, state)
        else:
            gone = (~all_of_them).nonzero().squeeze(1)
            out, over, where = state.index_select(0, gone), _at(carry, gone), places.index_select(0, gone)
            if rule is not None:
                out = rule.output(out, over, None if finished is None else finished.index_select(0, gone))
            result.index_copy_(0, where, out)
            if remainders is not None:
                remainders.index_copy_(0, where, over["remainders"])
            if kv == "active":
                context.hide(where)
            elif kv is not None:
                context.done(where)
        places, state = places.index_select(0, stay), state.index_select(0, stay)
        carry, routed = _at(carry, stay), _at(routed, stay)
        began = None if began is None else began.index_select(0, stay)
        protected = None if protected is None else protected.index_select(0, stay)
        missed = None if missed is None else missed.index_select(0, stay)

    def read():
        """Take in the tokens that a reader adds."""
        nonlocal places, state, carry, routed, protected, missed, began, result, remainders, merges
        new, moved = context.extend()
        merges = None if merges is None else merges.extend(context.tape_len)
        result = context.widen(result, context.read.appended)
        blank = torch.zeros_like(context.read.live)
        remainders = None if remainders is None else context.widen(remainders, blank)
        places = torch.cat((moved(places), new))
        order = places.argsort()

        def merge(each, new):
            return torch.cat((each, new)).index_select(0, order)

        added, nothing = context.states.index_select(0, new), torch.zeros_like(new, dtype=torch.bool)
        places, state = places.index_select(0, order), merge(state, added)
        carry = carry and _merged(carry, rule.start(added), merge)
        routed = routed and _merged(routed, router.start(added), merge)
        began = None if began is None else merge(began, added)
        protected = None if protected is None else merge(protected, nothing)
        missed = None if missed is None else merge(missed, nothing)
        if trace is not None:
            trace.extend(context.read)

    for depth in range(depths):
        if context.reads_at(depth):
            read()
        if not places.numel() and not context.reads_after(depth):
            break
        asks, step = depth in stack.halting_depths, None
        if trace is not None:
            step = Step(stack.schedule[depth], None, getattr(stack[depth], "step_kind", "layer"), counts=asks)
        some, choice, hidden = None, None, None  # some: who is computed, among the places; None: all
        if router is not None:
            asked = torch.ones_like(places, dtype=torch.bool)
            choice = router.choose(depth, state, routed, asked, context.sentence(places), protected, context.causal)
            routed = routed if choice.carry is None else choice.carry
            if trace is not None:
                step.kept, step.asked = put(choice.run.to(choice.probability), places), put(asked, places)
                step.probability = step.keeping = put(choice.probability, places)
                step.score = None if choice.score is None else put(choice.score, places)
            if choice.merged is not None:
                state, merges = choice.merged.state, merges.add(places, choice.merged.into)
                context.weigh(places, choice.merged.size)
            run = choice.run > 0
            if router.weighs or not router.monotone:
                some = run.nonzero().squeeze(1)
            if router.weighs:
                choice = Choice(*(each.index_select(0, some) for each in choice[:2]), _at(routed, some))
            else:
                choice = None
            if router.monotone:
                leave(run, stack.router_kv if stack.router_kv == "active" else None, torch.zeros_like(run))
                some = None
            elif some.numel() == places.numel():
                some = None
            else:
                missed = None if missed is None else missed | ~run
                if stack.router_kv == "active":
                    hidden = places[~run]
                    context.hide(hidden)
        at, before = (places, state) if some is None else (places.index_select(0, some), state.index_select(0, some))
        if at.numel():
            after = context.call(stack, depth, before, at)
        else:
            context.skip(stack, depth)
        if hidden is not None:
            context.show(hidden)
        going_on = None
        if at.numel():
            if choice is not None:
                after = router.combine(before, after, choice)
            ones = torch.ones_like(at, dtype=torch.bool)
            if trace is not None:
                step.alive = put(ones, at)
            if rule is not None and asks:
                part, since = carry if some is None else _at(carry, some), before
                if began is not None:
                    since = began if some is None else began.index_select(0, some)
                after, part, going_on, halting = rule.step(since, after, part, ones, depth == depths - 1)
                if trace is not None:
                    step.halted, step.probability = put(~going_on, at), put(halting, at)
                carry = part if some is None else {n: each.index_copy(0, some, part[n]) for n, each in carry.items()}
            state = after if some is None else state.index_copy(0, some, after)
            context.changed(at, after)
        elif trace is not None:
            step.alive = torch.zeros_like(context.tokens)
        began = state if began is not None and asks else began
        if going_on is not None:
            if some is not None:
                going_on = torch.ones_like(places, dtype=torch.bool).index_copy_(0, some, going_on)
            if depth < depths - 1:
                leave(going_on, stack.halting_kv, None)
            elif missed is not None:
                missed = missed & going_on
        if trace is not None:
            trace.steps.append(step)
    if places.numel():
        leave(torch.zeros_like(places, dtype=torch.bool), None, None if missed is None else ~missed)
    if trace is not None:
        trace.remainders = None if remainders is None else remainders.view(context.tokens.shape)
        stack.record(trace, context.tape_len)
    result = context.finish(stack, result)
    return result if merges is None else merges.spread(result)

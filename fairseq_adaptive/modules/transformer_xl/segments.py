"""What the runs of a stack need for Transformer-XL: a memory of its own at each depth, and relative positions.

What a depth remembers of a token that was not computed there is what the others of its segment read of it, for those of
the next segments, too:

- under ``recompute`` its state, that of a token that has halted at deeper depths, too. Where all have halted, and where
  LayerDrop leaves a depth out, memories are filled all the same
- under ``active`` nothing: the memory says for each depth who is hidden. Padding is hidden, too
- under ``first`` depths that share a layer share the memory of the first of them, and have none of their own
"""

import functools
from typing import Dict, List, Optional, Tuple

import torch
from torch import Tensor

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules.policies.base import where_token
from fairseq_adaptive.modules.stack.context import ALL, Context
from fairseq_adaptive.modules.stack.decoder_stack import DecoderStack
from fairseq_adaptive.modules.stack.packed_context import PackedContext
from fairseq_adaptive.modules.stack.run import run_dense, run_packed
from fairseq_adaptive.modules.stack.stack import LayerStack
from fairseq_adaptive.modules.tracing import refuse_tracing
from fairseq_adaptive.modules.transformer_xl.cache import KeyValueCache
from fairseq_adaptive.modules.transformer_xl.depth_memory import DepthMemory
from fairseq_adaptive.modules.transformer_xl.positions import ProjectedPositions, RelativePositions


class SegmentContext(Context):
    """All places of a segment, ``[B, T, C]``."""

    batch_dim, causal = 0, True

    def __init__(self, x: Tensor, tokens: Tensor, memory: DepthMemory):
        self.tokens = self.running = tokens
        self.start, self.memory, self.tape_len, self.reading = x, memory, 0, None

    @property
    def sentence(self):
        return torch.arange(len(self.tokens), device=self.tokens.device)[:, None].expand_as(self.tokens)

    def take(self, each):
        return each

    put = take

    def call(self, stack, depth, x, shown=ALL):
        out, weights = super().call(stack, depth, x, shown)
        if stack.router is not None:  # padding is never computed
            out = where_token(self.tokens, out, x)
        return out, weights

    def arguments(self, stack, depth, x, shown):
        memory, block = self.memory, stack[depth].attends
        if block is None:  # no memory
            return memory.extra[depth]
        visible = self._visible(shown)
        if visible is not None or stack.kv == "first":
            attention = functools.partial(self._attend, stack, depth, x, visible)
            return {"self_attention": attention, **memory.extra[depth]}
        memory.remember(x, depth)
        return {
            "positions": memory.positions(block, depth),
            "memory": memory.states[depth],
            "window": memory.window,
            **memory.extra[depth],
        }

    def _visible(self, shown):
        return None if shown.visible is None else shown.visible.masked_fill(~self.tokens, 0)

    def _attend(self, stack, depth, x, visible, read):
        """Attention, where keys are hidden or those of another depth; ``[B, T, C]``, what it reads, to ``[B, T, C]``."""
        memory, block = self.memory, stack[depth].attends
        attention, found = block.attention, memory.first(depth)
        if found is None:
            memory.remember(x, depth, visible)
            queries, *own = attention.by_head(attention.qkv_proj(read))
            found = memory.extend(block, depth, *own, visible)
            if stack.kv == "first":
                memory.keep_first(depth, found)
        else:
            queries = attention.by_head(attention.queries(read))[0]
        *keys, seen = found
        where = memory.positions(block, depth), memory.cache(depth), memory.window, seen
        return attention.over(queries, *keys, read, *where)

    def skip(self, stack, depth, x, shown=ALL):
        self.memory.skip(stack[depth].attends, depth, x, self._visible(shown))


class PackedSegment(PackedContext):
    """Running tokens, under relative attention over the memory and all tokens of a segment."""

    padding_is_fresh = False  # the memory has it

    def __init__(self, x: Tensor, tokens: Tensor, memory: DepthMemory, kv: str = "recompute", hides: bool = False):
        super().__init__(x.transpose(0, 1), ~tokens, causal=True, kv=kv)
        self.visible = tokens.clone() if hides else torch.ones_like(tokens)
        self.memory, self._hides, self._ran = memory, hides, 0

    def arguments(self, stack, depth, places):
        return {**super().arguments(stack, depth, places), **self.memory.extra[depth]}

    def _inputs(self, depth):
        """``[B, T, C]``; copied where they are remembered, since the run changes them in place."""
        cached = self.memory.cache(depth) is not None or not self.memory.length
        return (self.states if cached else self.states.clone()).unflatten(0, self.tokens.shape)

    def _all_keys(self, stack, depth, places, x):
        """Keys and values of memory and segment, ``[H, B, K, D]``, and who is seen, ``[B, K]`` or None."""
        memory, block = self.memory, stack[depth].attends
        self._ran, found = depth + 1, memory.first(depth)
        if found is not None:
            return found
        visible = self.visible if self._hides else None
        memory.remember(self._inputs(depth), depth, visible)
        shape = (*self.tokens.shape, block.attention.num_heads, block.attention.head_dim)
        own = (each.view(shape).permute(2, 0, 1, 3) for each in self.keys_and_values(stack, depth, places, x))
        found = memory.extend(block, depth, *own, visible)
        return memory.keep_first(depth, found) if self.kv == "first" else found

    def attend(self, x, stack, depth, places):
        """``[P, C]`` to ``[P, C]``."""
        memory, block, (batch, length) = self.memory, stack[depth].attends, self.tokens.shape
        attention, window, positions = block.attention, memory.window, memory.positions(block, depth)
        if places.numel() == batch * length and not self._hides and self.kv != "first":  # as in a dense run
            self._ran = depth + 1
            memory.remember(self._inputs(depth), depth)
            x = x.unflatten(0, self.tokens.shape)
            return block.attend(x, positions, memory.states[depth], window).flatten(0, 1)
        keys, values, seen = self._all_keys(stack, depth, places, x)
        unseen = 0 if window is None else max(0, keys.size(2) - length - window + 1)
        keys, values, seen = keys[:, :, unseen:], values[:, :, unseen:], None if seen is None else seen[:, unseen:]
        place = places % length + (keys.size(2) - length)
        where = positions, self.groups(places), place, memory.cache(depth), window, length == 1, seen
        return attention.packed(attention.queries(x), keys, values, *where)

    def skip(self, stack, depth):
        """A depth that no token reached remembers the states that they have."""
        if stack[depth].attends is not None:
            self._all_keys(stack, depth, self.tokens.new_zeros(0, dtype=torch.long), None)

    def finish(self, stack, result):
        for depth in range(self._ran, len(stack)):
            self.skip(stack, depth)
        return result.unflatten(0, self.tokens.shape)


def run_single(stack, x: Tensor, tokens: Tensor, memory: DepthMemory) -> Tensor:
    """As :func:`run_dense`, of one token of each sequence under a halting rule, in evaluation and without a trace.

    All sequences are computed until all are done: at one token the code around blocks costs more than what it would save.
    """
    rule, running, last = stack.halting, tokens, len(stack) - 1
    state, began, carry, everyone = x, x, rule.start(x), bool(tokens.all())
    for depth in range(len(stack)):
        before, block, more = state, stack[depth].attends, memory.extra[depth]
        if block is not None:
            memory.remember(before, depth)
            where = memory.positions(block, depth), memory.states[depth], memory.window
            state = stack.call(depth, before, positions=where[0], memory=where[1], window=where[2], **more)
        else:
            state = stack.call(depth, before, **more)
        if depth in stack.halting_depths:
            state, carry, running, _ = rule.step(began, state, carry, running, depth == last)
            began, goes_on = state, bool(running.any())
            if not goes_on:
                break
            everyone = goes_on if running.numel() == 1 else bool(running.all())
        elif not everyone:
            state = where_token(running, state, before)
    for rest in range(depth + 1, len(stack)):
        memory.skip(stack[rest].attends, rest, state)
    return rule.output(state, carry)


class SegmentStack(LayerStack):
    """Blocks of a Transformer-XL at the depths of a schedule, each depth with a memory of its own.

    Raises:
        UsageError: for ``keep``: a memory of inputs cannot have the keys of another depth
    """

    attention = "attention"
    resizable = False  # the decoder has a memory for each depth, of one kind
    unmergeable = DecoderStack.unmergeable

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.halting_kv == "keep":
            raise UsageError(
                "--halting-kv keep: the memory of a Transformer-XL has a depth's own states and no keys of another "
                "depth; choose recompute or active"
            )

    def caches(self, length: Optional[int], positions: RelativePositions) -> List[KeyValueCache]:
        """Empty caches of all depths, in which the depths of a layer keep their projected positions once.

        Args:
            length: how many positions each keeps; None: all
            positions: the encodings of distances
        """
        found: Dict[int, ProjectedPositions] = {}
        for number in range(self.unique_layers):
            block = self.layer(number).attends
            found[number] = None if block is None else ProjectedPositions.of(block.attention, positions)
        return [KeyValueCache(length, found[number]) for number in self.schedule]

    def forward(self, x: Tensor, tokens: Tensor, memory: DepthMemory) -> Tensor:
        """
        Args:
            x: ``[B, T, C]``
            tokens: ``[B, T]``, false at padding
            memory: read, and filled with what to remember

        Returns:
            ``[B, T, C]``

        Raises:
            UsageError: where tokens are hidden from attention that is not known, and so cannot be told who is
        """
        if self.recorder is None:
            return self._segment(x, tokens, memory)
        before = [_remembered(state) for state in memory.states]  # a cache grows
        out = self._segment(x, tokens, memory)
        self.recorder[-1].memory, self.recorder[-1].window = before, memory.window
        return out

    def _segment(self, x, tokens, memory):
        if not self.adaptive:
            return run_dense(self, SegmentContext(x, tokens, memory))
        refuse_tracing()
        single = x.size(1) == 1 and self.router is None and self.kv == "recompute" and not self.hides
        if single and self.recorder is None and self.packed is not False and self._packed_now():
            return run_single(self, x, tokens, memory)
        why = self.changed
        if why is not None and self.hides:
            raise UsageError(f"active hides tokens from attention, but here {why}: choose recompute")
        if why is not None or not self._packed_now():
            return run_dense(self, SegmentContext(x, tokens, memory))
        return run_packed(self, PackedSegment(x, tokens, memory, self.kv, self.hides))


def _remembered(state) -> Tuple[int, int]:
    """How many positions a depth remembers, and of how many it must make keys and values anew."""
    if isinstance(state, KeyValueCache):
        return len(state), 0
    return (0, 0) if state is None else (state.size(1), state.size(1))

"""What the runs of a stack need for Transformer-XL: a memory of its own at each depth, and relative positions.

A token that has halted is remembered with its last state, at deeper depths, too: those of this segment and of the next
read that. Where all have halted, and where LayerDrop leaves a depth out, memories are filled all the same.
"""

from typing import Dict, List, Optional

import torch
from torch import Tensor

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules.stack.context import Context
from fairseq_adaptive.modules.stack.packed_context import PackedContext
from fairseq_adaptive.modules.stack.run import run_dense, run_packed
from fairseq_adaptive.modules.stack.stack import LayerStack
from fairseq_adaptive.modules.transformer_xl.relative_attention import KeyValueCache, RelativePositions


class DepthMemory:
    """What each depth knows of the positions before a call, and what it will know after it.

    Args:
        states: one entry a depth: None, inputs ``[B, M, C]``, or a :class:`KeyValueCache`, which is its own memory
        length: how many positions are remembered
        positions: the encodings of distances
        window: how many keys each position sees (None: all)
        extra: for each depth what its layer takes besides; of a supernet
    """

    def __init__(
        self,
        states: List,
        length: int,
        positions: RelativePositions,
        window: Optional[int],
        extra: Optional[List[Dict]] = None,
    ):
        self.states, self.length, self.positions, self.window = states, length, positions, window
        self.extra = extra or [{}] * len(states)
        self.remembered: List = [None] * len(states)

    def remember(self, x: Tensor, depth: int):
        """Take ``[B, T, C]``, which all tokens have at the input of a depth; a cache gets keys and values instead."""
        state = self.states[depth]
        if isinstance(state, KeyValueCache):
            self.remembered[depth] = state
        elif self.length:
            x = x.detach()
            self.remembered[depth] = (x if state is None else torch.cat([state, x], dim=1))[:, -self.length :]

    def extend(self, block, depth: int, keys: Tensor, values: Tensor):
        """Keys and values of this segment, ``[H, B, T, D]``, to those of memory and segment, ``[H, B, K, D]``."""
        state = self.states[depth]
        if isinstance(state, KeyValueCache):
            return state.append(keys, values)
        if state is None:
            return keys, values
        past = block.attention.by_head(block.attention.keys_and_values(block.before(state)))
        return torch.cat((past[0], keys), 2), torch.cat((past[1], values), 2)

    def skip(self, block, depth: int, x: Tensor):
        """As :meth:`remember`, where the depth does not run."""
        if block is None:
            return
        self.remember(x, depth)
        if isinstance(self.states[depth], KeyValueCache):
            keys_and_values = block.attention.keys_and_values(block.before(x))
            self.states[depth].append(*block.attention.by_head(keys_and_values))


class SegmentContext(Context):
    """All places of a segment, ``[B, T, C]``."""

    batch_dim, causal = 0, True

    def __init__(self, x: Tensor, tokens: Tensor, memory: DepthMemory):
        self.tokens = self.running = tokens
        self.start, self.memory, self.tape_len, self.reading = x, memory, 0, None

    def take(self, each):
        return each

    put = take

    def arguments(self, stack, depth, x, shown):
        memory = self.memory
        if stack[depth].attends is None:  # no memory
            return memory.extra[depth]
        memory.remember(x, depth)
        return {
            "positions": memory.positions,
            "memory": memory.states[depth],
            "window": memory.window,
            **memory.extra[depth],
        }

    def skip(self, stack, depth, x):
        self.memory.skip(stack[depth].attends, depth, x)


class PackedSegment(PackedContext):
    """Running tokens, under relative attention over the memory and all tokens of a segment."""

    padding_is_fresh = False  # the memory has it

    def __init__(self, x: Tensor, tokens: Tensor, memory: DepthMemory):
        super().__init__(x.transpose(0, 1), ~tokens, causal=True)
        self.visible = torch.ones_like(tokens)
        self.memory, self._ran = memory, 0

    def arguments(self, stack, depth, places):
        return {**super().arguments(stack, depth, places), **self.memory.extra[depth]}

    def _inputs(self, depth):
        """``[B, T, C]``; copied where they are remembered, since the run changes them in place."""
        cached = isinstance(self.memory.states[depth], KeyValueCache) or not self.memory.length
        return (self.states if cached else self.states.clone()).unflatten(0, self.tokens.shape)

    def _all_keys(self, stack, depth, places, x):
        """Keys and values of memory and segment, ``[H, B, K, D]``."""
        block = stack[depth].attends
        self.memory.remember(self._inputs(depth), depth)
        shape = (*self.tokens.shape, block.attention.num_heads, block.attention.head_dim)
        own = (each.view(shape).permute(2, 0, 1, 3) for each in self.keys_and_values(stack, depth, places, x))
        return self.memory.extend(block, depth, *own)

    def attend(self, x, stack, depth, places):
        """``[P, C]`` to ``[P, C]``."""
        self._ran = depth + 1
        block, (batch, length), state = stack[depth].attends, self.tokens.shape, self.memory.states[depth]
        attention, window = block.attention, self.memory.window
        if places.numel() == batch * length:  # as in a dense run
            self.memory.remember(self._inputs(depth), depth)
            x = x.unflatten(0, self.tokens.shape)
            return block.attend(x, self.memory.positions, state, window).flatten(0, 1)
        keys, values = self._all_keys(stack, depth, places, x)
        queries = attention.queries(x)
        unseen = 0 if window is None else max(0, keys.size(2) - length - window + 1)
        keys, values = keys[:, :, unseen:], values[:, :, unseen:]
        cache = state if isinstance(state, KeyValueCache) else None
        place = places % length + (keys.size(2) - length)
        where = self.memory.positions, self.groups(places), place, cache, window, length == 1
        return attention.packed(queries, keys, values, *where)

    def finish(self, stack, result):
        """Depths that no token reached remember the last states."""
        nobody = self.tokens.new_zeros(0, dtype=torch.long)
        for depth in range(self._ran, len(stack)):
            if stack[depth].attends is not None:
                self._all_keys(stack, depth, nobody, None)
        return result.unflatten(0, self.tokens.shape)


class SegmentStack(LayerStack):
    """Blocks of a Transformer-XL at the depths of a schedule, each depth with a memory of its own.

    Raises:
        UsageError: for a router, and for tokens that are done and not read as their last state: a memory has no place
            to say what is hidden, and inputs cannot be those of keys of another depth
    """

    attention = "attention"
    resizable = False  # the decoder has a memory for each depth, of one kind

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.router is not None:
            raise UsageError(
                "a Transformer-XL takes no router: its memory cannot say at which depth a token is "
                "hidden; leave out --router"
            )
        if self.halting_kv != "recompute":
            raise UsageError(
                f"--halting-kv {self.halting_kv}: the memory of a Transformer-XL has the states of all "
                "tokens; choose recompute"
            )

    def forward(self, x: Tensor, tokens: Tensor, memory: DepthMemory) -> Tensor:
        """
        Args:
            x: ``[B, T, C]``
            tokens: ``[B, T]``, false at padding
            memory: read, and filled with what to remember

        Returns:
            ``[B, T, C]``
        """
        if self.halting is None or not self._packed_now() or self.changed is not None:
            return run_dense(self, SegmentContext(x, tokens, memory))
        return run_packed(self, PackedSegment(x, tokens, memory))

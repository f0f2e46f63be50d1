"""The memories of all depths of a stack in one call: read at first, and filled for the next."""

from typing import Dict, List, Optional

import torch
from torch import Tensor

from fairseq_adaptive.modules.transformer_xl.cache import KeyValueCache
from fairseq_adaptive.modules.transformer_xl.positions import LayerPositions, ProjectedPositions, RelativePositions


class DepthMemory:
    """What each depth knows of the positions before a call, and what it will know after it.

    Args:
        states: one entry a depth: None, inputs ``[B, M, C]``, or a :class:`KeyValueCache`, which is its own memory; and
            after them, where tokens are hidden, one more a depth: None or who is seen of the inputs, ``[B, M]``
        length: how many positions are remembered
        positions: the encodings of distances
        window: how many keys each position sees (None: all)
        schedule: the layer that serves each depth
        extra: for each depth what its layer takes besides; of a supernet

    Attributes:
        remembered: what ``states`` is to be in the next call
    """

    def __init__(
        self,
        states: List,
        length: int,
        positions: RelativePositions,
        window: Optional[int],
        schedule,
        extra: Optional[List[Dict]] = None,
    ):
        depths = len(schedule)
        self.states, self._seen = states[:depths], states[depths:] or [None] * depths
        self.length, self._encodings, self.window, self._schedule = length, positions, window, schedule
        self.extra = extra or [{}] * depths
        self._remembered: List = [None] * depths
        self._seen_later: List = [None] * depths
        self._positions: Dict[int, LayerPositions] = {}
        self._first: Dict[int, tuple] = {}  # by layer: keys and values of memory and segment, and who is seen

    @property
    def remembered(self) -> List:
        hides = any(each is not None for each in self._seen_later)
        return self._remembered + self._seen_later if hides else self._remembered

    def positions(self, block, depth: int) -> LayerPositions:
        """Those of the layer of a depth."""
        number = self._schedule[depth]
        if number not in self._positions:
            projected = ProjectedPositions.of(block.attention, self._encodings)
            self._positions[number] = LayerPositions(self._encodings, projected)
        return self._positions[number]

    def cache(self, depth: int) -> Optional[KeyValueCache]:
        state = self.states[depth]
        return state if isinstance(state, KeyValueCache) else None

    def remember(self, x: Tensor, depth: int, visible: Optional[Tensor] = None):
        """Take ``[B, T, C]``, which all tokens have at the input of a depth, and who is seen, ``[B, T]``; a cache gets
        keys and values instead."""
        state = self.states[depth]
        if isinstance(state, KeyValueCache):
            self._remembered[depth] = state
        elif self.length:
            x = x.detach()
            self._remembered[depth] = (x if state is None else torch.cat([state, x], dim=1))[:, -self.length :]
            if visible is not None:
                self._seen_later[depth] = self._all_seen(depth, visible.detach() > 0)[:, -self.length :]

    def _all_seen(self, depth, visible):
        """``[B, T]`` of the segment to ``[B, K]`` of memory and segment, of tensors."""
        state, seen = self.states[depth], self._seen[depth]
        if state is None:
            return visible
        past = torch.ones(state.shape[:2], device=visible.device) if seen is None else seen
        return torch.cat((past.to(visible), visible), 1)

    def extend(self, block, depth: int, keys: Tensor, values: Tensor, visible: Optional[Tensor] = None):
        """Keys and values of this segment, ``[H, B, T, D]``, and who is seen, ``[B, T]`` or None, to those of memory and
        segment, ``[H, B, K, D]`` and ``[B, K]`` or None."""
        state = self.states[depth]
        if isinstance(state, KeyValueCache):
            seen = None if visible is None else state.hide(visible)
            return *state.append(keys, values), seen
        seen = None if visible is None else self._all_seen(depth, visible)
        if state is None:
            return keys, values, seen
        past = block.attention.by_head(block.attention.keys_and_values(block.before(state)))
        return torch.cat((past[0], keys), 2), torch.cat((past[1], values), 2), seen

    def first(self, depth: int):
        """What :meth:`keep_first` took at an earlier depth of the same layer, or None."""
        return self._first.get(self._schedule[depth])

    def keep_first(self, depth: int, found):
        """Take what :meth:`extend` returned, for all depths of the layer."""
        self._first[self._schedule[depth]] = found
        return found

    def skip(self, block, depth: int, x: Tensor, visible: Optional[Tensor] = None):
        """As :meth:`remember`, where the depth does not run."""
        if block is None or self.first(depth) is not None:
            return
        self.remember(x, depth, visible)
        cache = self.cache(depth)
        if cache is not None:
            if visible is not None:
                cache.hide(visible)
            cache.append(*block.attention.by_head(block.attention.keys_and_values(block.before(x))))

"""Where the tokens of a packed run lie, what they see, and what a layer's call gets: only what is computed is there.

States are packed: token t of sequence b has the place b T + t of B T; P places are computed.
"""

import functools
from typing import Callable, Dict, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_adaptive.modules.layers.native_layer import native_layer
from fairseq_adaptive.modules.stack.attention import attend_from, attend_sized, attend_within, heads, log_sizes
from fairseq_adaptive.modules.stack.context import past_length
from fairseq_adaptive.modules.stack.cross_attention import PackedCrossAttention
from fairseq_adaptive.modules.stack.packing import Groups, token_mask
from fairseq_adaptive.modules.stack.reading import Reading
from fairseq_adaptive.ops.skim_attention import Sequences


class PackedContext:
    """Tokens see others that are not computed: the keys and values of a token are kept, for every layer that has made
    them, until its state changes. Those of a halted token are computed once a layer, which is exact.

    Args:
        x: T x B x C
        padding_mask: B x T, true at padding
        causal: a token sees itself and those before it
        cross: attention over a source, or None
        tape_len: how many states at the end are tape tokens
        reading: what is to be read in this run, or None
        kv: ``recompute``, ``keep`` or ``first``

    Attributes:
        states: B T x C, the last state of every token
        tokens: B x T, true at tokens
        size: B T, for how many tokens each key stands; None: for one
        remembers: whether tokens that have left the run may be seen
    """

    padding_is_fresh = True  # nobody reads the keys of padding
    remembers = True
    read = size = None

    def __init__(
        self,
        x: Tensor,
        padding_mask: Optional[Tensor],
        causal: bool = False,
        cross: Optional[PackedCrossAttention] = None,
        tape_len: int = 0,
        reading: Optional[Reading] = None,
        kv: str = "recompute",
    ):
        self.tokens, self.causal, self.cross, self.tape_len = token_mask(x, padding_mask), causal, cross, tape_len
        self.states, self.reading, self.kv = self._flat(x), reading, kv
        self.visible = self.tokens.clone()  # B x T, whose keys the others see at present
        self._hides = not bool(self.tokens.all())
        self._places = self._groups = None
        self._made: Dict[int, Tuple[Tensor, ...]] = {}  # keys, values: B T x C; fresh, ever: B T
        self._done = None if kv == "recompute" else torch.zeros_like(self.tokens.flatten())

    def _flat(self, x):
        """T x B x C -> B T x C, a copy"""
        return x.transpose(0, 1).clone(memory_format=torch.contiguous_format).flatten(0, 1)

    def finish(self, stack, result: Tensor) -> Tensor:
        """End the run; B T x C -> T x B x C."""
        return result.unflatten(0, self.tokens.shape).transpose(0, 1)

    def sentence(self, places: Tensor) -> Tensor:
        """P, the numbers of the sequences."""
        return places.div(self.tokens.size(1), rounding_mode="floor")

    def position(self, stack, places: Tensor) -> Tensor:
        """P, how many tokens of its sentence come before each."""
        return (self.tokens.cumsum(1) - 1).flatten().index_select(0, places)

    def arguments(self, stack, depth: int, places: Tensor) -> Dict:
        """What the layer of a depth is called with beside the states of some places."""
        found = {"self_attention": functools.partial(self.attend, stack=stack, depth=depth, places=places)}
        if self.cross is not None:
            found["cross_attention"] = functools.partial(self.cross, layer=stack[depth], depth=depth, places=places)
        if self.tape_len:
            length = self.tokens.size(1)
            found["tape"] = places % length >= length - self.tape_len
        return found

    def call(self, stack, depth: int, x: Tensor, places: Tensor) -> Tensor:
        """P x C -> P x C."""
        out = stack.call(depth, x, **self.arguments(stack, depth, places))
        return out[0] if isinstance(out, tuple) else out

    def changed(self, places: Tensor, state: Tensor):
        """Say that the states of some places are new."""
        self.states.index_copy_(0, places, state)
        for _, _, fresh, _ in self._made.values():
            fresh[places] = False

    def done(self, places: Tensor):
        """Say that the tokens at some places have halted."""
        if self._done is not None:
            self._done[places] = True

    def hide(self, places: Tensor):
        """Nobody sees the tokens at some places any more."""
        self.visible.view(-1)[places], self._hides = False, True

    def show(self, places: Tensor):
        """Undo :meth:`hide`."""
        self.visible.view(-1)[places] = True

    def weigh(self, places: Tensor, size: Tensor):
        """Say for how many tokens those at some places stand, P."""
        if self.size is None:
            self.size, self._places = size.new_ones(self.tokens.numel()), None
        self.size.index_copy_(0, places, size)

    def skip(self, stack, depth: int):
        """Say that nothing is computed at a depth; caches must have no gap."""

    def keys_and_values(self, stack, depth: int, places: Tensor, x: Optional[Tensor]) -> Tuple[Tensor, Tensor]:
        """Those of all tokens that are seen, B T x C.

        Args:
            places: P, where the layer is computed
            x: P x C, what its attention reads there; None where nothing is computed
        """
        with stack.running_at(depth):
            return self._keys_and_values(stack.schedule[depth], stack[depth].attends, stack.lora_rank, places, x)

    def _keys_and_values(self, number, block, by_depth, places, x):
        known = self.kv == "first" and number in self._made and self._made[number][3].all()
        new = None if x is None or known else block.keys_and_values(x)
        if number not in self._made:
            some = block.keys_and_values(self.states[:0]) if new is None else new
            made = (each.new_zeros(len(self.states), each.size(-1)) for each in some)
            unneeded = ~self.tokens.flatten() & self.padding_is_fresh
            self._made[number] = *made, unneeded, unneeded.clone()
        keys, values, fresh, ever = self._made[number]
        if by_depth:  # those of another depth are made by other maps
            fresh.copy_(~self.tokens.flatten() & self.padding_is_fresh)
        if self.kv == "first":
            missing = ~ever
            new = new if missing.any() else None
        elif self.kv == "keep":
            missing = ~fresh & self.visible.flatten() & ~(self._done & ever)
        else:
            missing = ~fresh & self.visible.flatten()  # has halted, or passed by
        if new is not None:
            self._put(number, places, new)
            missing[places] = False
        missing = missing.nonzero().squeeze(1)
        if missing.numel():
            read = block.before(self.states.index_select(0, missing))
            self._put(number, missing, block.keys_and_values(read))
        return keys, values

    def _put(self, number, places, new):
        *made, fresh, ever = self._made[number]
        for all_of_them, some in zip(made, new):
            all_of_them.index_copy_(0, places, some.to(all_of_them.dtype))
        fresh[places] = True
        if self._done is not None:
            ever[places] = True

    def groups(self, places: Tensor) -> Groups:
        if self._places is not places:
            self._places, self._groups = places, Groups(self.sentence(places), len(self.tokens))
        return self._groups

    def attend(self, x: Tensor, stack, depth: int, places: Tensor) -> Tensor:
        """P x C -> P x C."""
        groups, shape, attention = self.groups(places), self.tokens.shape, stack[depth].self_attn
        keys, values = (
            groups.select(heads(each.unflatten(0, shape), attention))
            for each in self.keys_and_values(stack, depth, places, x)
        )
        mask = groups.select(self.visible)[:, None, None] if self._hides else None
        if self.size is not None:
            size = self.size.view(shape).masked_fill(~self.visible, 0.0)
            mask = log_sizes(groups.select(size)).to(x.dtype)
        if self.causal:
            place = groups.pad(places % shape[1])  # G x Q
            seen = torch.arange(shape[1], device=x.device) <= place[:, None, :, None]
            mask = seen if mask is None else seen & mask
        return attend_from(attention, x, groups, keys, values, mask)

    def reads_at(self, depth: int) -> bool:
        return self.reading is not None and self.reading.reader.depth == depth

    def reads_after(self, depth: int) -> bool:
        return self.reading is not None and self.reading.reader.depth > depth

    def extend(self) -> Tuple[Tensor, Callable]:
        """Read, in the middle of a run.

        Returns:
            the new places; and what turns old places into those of the wider batch
        """
        batch, length = self.tokens.shape
        x = self.states.unflatten(0, (batch, length)).transpose(0, 1)
        self.read = self.reading(x, ~self.tokens)
        live, self.tape_len = self.read.live, self.read.live.size(1)
        self.states = self.widen(self.states, self.read.appended)
        self.visible = torch.cat((self.visible, live), 1)
        self.tokens = torch.cat((self.tokens, live), 1)
        self._hides = self._hides or not bool(live.all())
        nothing = live.new_zeros(live.shape)
        for number, (keys, values, fresh, ever) in self._made.items():
            blank = self.read.appended.new_zeros(*live.shape, 1)
            wide = (self.widen(each, blank.expand(-1, -1, each.size(-1)).to(each)) for each in (keys, values))
            unneeded = ~live & self.padding_is_fresh
            self._made[number] = *wide, self.widen(fresh, unneeded), self.widen(ever, unneeded)
        if self._done is not None:
            self._done = self.widen(self._done, nothing)
        if self.size is not None:
            self.size = self.widen(self.size, torch.ones_like(live))
        wider = length + live.size(1)
        place = torch.arange(batch * wider, device=x.device).view(batch, wider)[:, length:][live]
        return place, lambda places: places + places.div(length, rounding_mode="floor") * (wider - length)

    def widen(self, each: Tensor, new: Tensor) -> Tensor:
        """B T x ... and B x S x ... -> B (T + S) x ..."""
        return torch.cat((each.unflatten(0, (len(new), -1)), new.to(each.dtype)), 1).flatten(0, 1)


class ActiveContext(PackedContext):
    """Nobody sees a token that is not computed: attention is within what is."""

    remembers = False

    def changed(self, places, state):
        if self.reading is not None:
            self.states.index_copy_(0, places, state)

    def _nothing(self, *args, **kwargs):
        """What is not computed is not seen anyway."""

    hide = show = _nothing

    def groups(self, places):
        if self._places is not places:
            numbers, batch = self.sentence(places), len(self.tokens)
            groups = self.causal or self.size is not None
            self._groups = Groups(numbers, batch) if groups else Sequences(numbers.bincount(minlength=batch))
            self._places = places
        return self._groups

    def call(self, stack, depth, x, places):
        if self.size is None and self.cross is None and not self.causal:
            layer = native_layer(stack, depth, x)
            if layer is not None:
                alone = len(self.tokens) == 1
                return layer(x, [places.numel()] if alone else self.groups(places).counts)
        return super().call(stack, depth, x, places)

    def attend(self, x, stack, depth, places):
        attention, where = stack[depth].self_attn, self.groups(places)
        if self.size is not None:
            return attend_sized(attention, x, where, self.size.index_select(0, places))
        if not self.causal:
            return attend_within(attention, where, x)
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        # places without a token are behind those that have one: causality hides them, too
        out = F.scaled_dot_product_attention(*(heads(where.pad(part(x)), attention) for part in parts), is_causal=True)
        return attention.out_proj(where.unpad(out.transpose(1, 2).flatten(2)))


class StepContext(PackedContext):
    """One step of incremental decoding, T = 1, over the tokens of the steps before.

    A later token may go deeper than this one: every depth's cache gets keys and values of every token that later ones
    may see there; where some tokens of a batch are hidden, the depth's own padding mask says which. Under ``first`` all
    depths that a layer serves read one cache, that of its first. The caches have fairseq's names and layout, so that
    beam search reorders them.

    Args:
        x, padding_mask, cross, kv: of :class:`PackedContext`
        incremental_state: fairseq's caches, changed in place
    """

    def __init__(self, x, padding_mask, incremental_state: Dict, cross=None, kv="recompute"):
        super().__init__(x, padding_mask, True, cross, kv=kv)
        self._incremental_state, self._ran, self._appended = incremental_state, 0, set()
        self._nobody = self.tokens.new_zeros(0, dtype=torch.long)

    def position(self, stack, places):
        return torch.full_like(places, past_length(stack, self._incremental_state))

    def _append(self, stack, depth, places, x):
        """Add this step to the cache of a depth, and return it."""
        self._ran, layer, first = depth + 1, stack[depth], depth
        if self.kv == "first":
            first = stack.schedule.index(stack.schedule[depth])
        state = layer.depth_cache(self._incremental_state, first)
        cache = layer.self_attn._get_input_buffer(state)
        if first in self._appended:
            return cache
        self._appended.add(first)
        made = self.keys_and_values(stack, depth, places, x)
        for name, new in zip(("prev_key", "prev_value"), (heads(each.unsqueeze(1), layer.self_attn) for each in made)):
            cache[name] = torch.cat((cache[name], new), 2) if name in cache else new.clone()
        past = cache.get("prev_key_padding_mask")
        if self._hides or past is not None:
            if past is None:
                past = self.tokens.new_zeros((len(self.tokens), cache["prev_key"].size(2) - 1))
            cache["prev_key_padding_mask"] = torch.cat((past.bool(), ~self.visible), 1)
        layer.self_attn._set_input_buffer(state, cache)
        return cache

    def attend(self, x, stack, depth, places):
        groups, cache = self.groups(places), self._append(stack, depth, places, x)
        padding = cache.get("prev_key_padding_mask")
        mask = None if padding is None else ~groups.select(padding)[:, None, None]
        keys, values = (groups.select(cache[name]) for name in ("prev_key", "prev_value"))
        return attend_from(stack[depth].self_attn, x, groups, keys, values, mask)

    def skip(self, stack, depth):
        self._ran = depth + 1
        if self.visible.any():  # a depth at which all are hidden has nothing to keep
            self._append(stack, depth, self._nobody, None)

    def finish(self, stack, result):
        for depth in range(self._ran, len(stack)):
            self.skip(stack, depth)
        return super().finish(stack, result)

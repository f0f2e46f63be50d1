"""Where the tokens of a dense run lie, what they see, and what a layer's call gets.

A context belongs to one call of one stack. All that differs between fairseq's layers, packed tokens, tapes and the
blocks of a Transformer-XL is here, and the run knows none of it.
"""

import functools
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from fairseq_adaptive.modules.layers.native_layer import native_layers
from fairseq_adaptive.modules.stack.attention import attend_padded, attend_sized, attend_within
from fairseq_adaptive.modules.stack.merges import Merges
from fairseq_adaptive.modules.stack.packing import Groups, PackedTokens, token_mask
from fairseq_adaptive.modules.stack.reading import Reading


class Shown(NamedTuple):
    """What is seen of the tokens that are not computed at a depth; None: all, as it is.

    Attributes:
        visible: ..., 1 where the others see a token's keys and 0 where they do not
        done: ..., true at tokens that have halted
        size: ..., for how many tokens a key stands, where some have been merged
    """

    visible: Optional[Tensor] = None
    done: Optional[Tensor] = None
    size: Optional[Tensor] = None


ALL = Shown()


class KeptKeys:
    """The keys and values that the tokens of a dense run read under ``keep`` and ``first``, layer by layer."""

    def __init__(self, answer: str):
        self._answer, self._made = answer, {}

    def __call__(self, number: int, shown: Shown, keys: Tensor, values: Tensor) -> Tuple[Tensor, Tensor]:
        """Of what a layer makes of the states at a depth, those that are read: ... x C, both."""
        new = torch.ones_like(keys[..., 0], dtype=torch.bool) if shown.visible is None else shown.visible > 0
        if number not in self._made:
            self._made[number] = keys, values, new
            return keys, values
        *made, ever = self._made[number]
        if self._answer == "first":
            return made
        new = new & ~(shown.done & ever) if shown.done is not None else new
        keys, values = (torch.where(new.unsqueeze(-1), *pair) for pair in zip((keys, values), made))
        self._made[number] = keys, values, ever | new
        return keys, values


class Context:
    """All places of a batch, T x B x C, under the layers' own attention.

    Args:
        x: T x B x C
        padding_mask: B x T, true at padding
        tape_len: how many states at the end are tape tokens
        reading: what is to be read in this run, or None

    Attributes:
        start: the states before the first depth, in this layout
        running: ..., true at tokens
        sentence: ..., the number of the sequence of each token
        tokens: B x T, true at tokens
        causal: a token sees those before it
        batch_dim: which dimension of the result has the sequences
        read: what was read, or None
        weights: the attention weights of every token at its last depth, ... x B x T x S, or None
    """

    batch_dim, causal, read, weights = 1, False, None, None
    runs_all = False  # no depth may be left out, and all are run where all tokens have halted

    def __init__(self, x: Tensor, padding_mask: Optional[Tensor], tape_len: int = 0, reading: Optional[Reading] = None):
        self.start, self.padding_mask, self.tape_len, self.reading = x, padding_mask, tape_len, reading
        self.tokens = token_mask(x, padding_mask)
        self.running = self.tokens.transpose(0, 1)

    @property
    def sentence(self) -> Tensor:
        return torch.arange(self.start.size(1), device=self.start.device).expand(self.start.size(0), -1)

    def take(self, each: Tensor) -> Tensor:
        """B x T -> ..."""
        return each.transpose(0, 1)

    def put(self, each: Tensor) -> Tensor:
        """... -> B x T"""
        return each.transpose(0, 1)

    def arguments(self, stack, depth: int, x: Tensor, shown: Shown) -> Dict:
        """What the layer of a depth is called with beside its states."""
        return {"encoder_padding_mask": self.padding_mask, "tape_len": self.tape_len}

    def call(self, stack, depth: int, x: Tensor, shown: Shown = ALL) -> Tuple[Tensor, Optional[Tensor]]:
        """Run a layer on all tokens; returns states and attention weights or None."""
        out = stack.call(depth, x, **self.arguments(stack, depth, x, shown))
        return out[:2] if isinstance(out, tuple) else (out, None)

    def skip(self, stack, depth: int, x: Tensor, shown: Shown = ALL):
        """Say that a depth does not run, at any token; memories must have no gap."""

    def finish(self, x: Tensor) -> Tensor:
        """The result of a run, from states in this layout."""
        return x

    def reads_at(self, depth: int) -> bool:
        return self.reading is not None and self.reading.reader.depth == depth

    def reads_after(self, depth: int) -> bool:
        return self.reading is not None and self.reading.reader.depth > depth

    def extend(self, stack, x: Tensor) -> Tuple["Context", Tensor, Callable]:
        """Read, in the middle of a run.

        Returns:
            the context of the rest of the run, whose ``start`` has old and new states; the new states; and what puts
            values of old and of new tokens together
        """
        read = self.reading(x, self.padding_mask)
        new = read.appended.transpose(0, 1)
        mask = torch.cat((~self.tokens, ~read.live), 1)
        context = self._with_tape(stack, torch.cat((x, new)), mask, read)
        context.read = read
        return context, new, lambda old, new: torch.cat((old, new))

    def _with_tape(self, stack, x, padding_mask, read):
        return encoder_context(stack, x, padding_mask, read.live.size(1), read)


class TokenContext(Context):
    """Tokens without padding, P x C, under attention that leaves out what is hidden, differentiably."""

    def __init__(self, x, padding_mask, tape_len=0, reading=None, kv="recompute"):
        self._x, self._packed = x.transpose(0, 1), PackedTokens(token_mask(x, padding_mask))
        self.tokens, self.padding_mask, self.reading = self._packed.tokens, padding_mask, reading
        self.take, self.put, self._sequences = self._packed.take, self._packed.put, self._packed.sequences()
        self.start = self.take(self._x)
        self.running = torch.ones(len(self.start), dtype=torch.bool, device=x.device)
        self._keys = KeptKeys(kv) if kv in ("keep", "first") else None
        self._groups, self._tape, self.tape_len = None, None, tape_len
        if tape_len:
            self._tape = self.take(
                (torch.arange(x.size(0), device=x.device) >= x.size(0) - tape_len)[None].expand_as(self.tokens)
            )

    @property
    def sentence(self):
        return self.take(torch.arange(len(self.tokens), device=self.start.device)[:, None].expand_as(self.tokens))

    def arguments(self, stack, depth, x, shown):
        keys = self._keys and functools.partial(self._keys, stack.schedule[depth], shown)
        if shown.size is None:
            attention = functools.partial(
                attend_within, stack[depth].self_attn, self._sequences, kept=shown.visible, keys=keys
            )
        else:
            if self._groups is None:
                self._groups = Groups(self.sentence, len(self.tokens))
            attention = functools.partial(
                attend_sized, stack[depth].self_attn, groups=self._groups, size=shown.size * shown.visible, keys=keys
            )
        tape = {} if self._tape is None else {"tape": self._tape}
        return {"self_attention": attention, **tape}

    def finish(self, x):
        return self.put(x, self._x).transpose(0, 1)

    def extend(self, stack, x):
        context, new, _ = super().extend(stack, self.finish(x))
        length, batch = self.tokens.size(1), len(self.tokens)
        place = torch.arange(context.tokens.numel(), device=x.device).view(batch, -1)
        order = torch.cat((self.take(place[:, :length]), place[:, length:][context.read.live])).argsort()
        live = context.read.live
        return context, new.transpose(0, 1)[live], lambda old, new: torch.cat((old, new)).index_select(0, order)


class NativeContext(TokenContext):
    """Tokens without padding, P x C, of a run without policies in which each layer is one native call."""

    def __init__(self, x, padding_mask, layers: Sequence[Callable]):
        super().__init__(x, padding_mask)
        self._layers, self._counts = layers, self.tokens.sum(1)

    def call(self, stack, depth, x, shown=ALL):
        return self._layers[depth](x, self._counts), None


class TapeContext(Context):
    """Sequences whose tapes are of one length together, in inference where all tokens run: no dead tape is computed.

    The states are a list of T x B x C, one for each length.
    """

    def __init__(self, x, padding_mask, read):
        super().__init__(x, padding_mask, read.live.size(1))
        lengths, base = read.live.sum(1), x.size(0) - read.live.size(1)
        self._x, self._parts, self.start = x, [], []
        for tape_len in lengths.unique().tolist():
            sentences, end = (lengths == tape_len).nonzero().squeeze(1), base + tape_len
            mask = padding_mask[sentences, :end]
            self._parts.append(
                (sentences, end, {"encoder_padding_mask": mask if mask.any() else None, "tape_len": tape_len})
            )
            self.start.append(x[:end, sentences])

    def call(self, stack, depth, x, shown=ALL):
        return [stack.call(depth, part, **where) for part, (*_, where) in zip(x, self._parts)], None

    def finish(self, x):
        out = torch.zeros_like(self._x)
        for part, (sentences, end, _) in zip(x, self._parts):
            out[:end, sentences] = part.to(out.dtype)
        return out


class DecoderContext(Context):
    """All places of a batch of decoder layers, T x B x C; T is 1 in incremental decoding.

    Args:
        x, padding_mask: of :class:`Context`
        where: the arguments of a layer that are the same at all depths
        weights_at: at which depths attention weights are wanted
        kv: what is read of tokens that have halted
    """

    def __init__(self, x, padding_mask, where: Dict, weights_at: range, kv="recompute"):
        super().__init__(x, padding_mask)
        self._where, self._weights_at = {**where, "self_attn_padding_mask": padding_mask}, weights_at
        self.causal = where["self_attn_mask"] is not None or where["incremental_state"] is not None
        self._keys = KeptKeys(kv) if kv in ("keep", "first") else None

    def position(self, stack) -> Tensor:
        """T x B, how many tokens of its sentence come before each."""
        state = self._where["incremental_state"]
        return self.take(self.tokens.cumsum(1) - 1) + (0 if state is None else past_length(stack, state))

    def arguments(self, stack, depth, x, shown):
        attention = None
        if shown.visible is not None or self._keys is not None:
            visible = shown.visible
            if self.padding_mask is not None:
                visible = self.running.to(x) if visible is None else visible * self.running
            keys = self._keys and functools.partial(self._keys, stack.schedule[depth], shown)
            attention = functools.partial(
                attend_padded, stack[depth].self_attn, visible=visible, causal=self.causal, keys=keys
            )
        wanted = depth in self._weights_at
        return {**self._where, "need_attn": wanted or None, "need_head_weights": wanted, "self_attention": attention}

    def call(self, stack, depth, x, shown=ALL):
        x, weights = super().call(stack, depth, x, shown)
        return x, weights if depth in self._weights_at else None


class PlainContext(Context):
    """All places of a batch, under attention that is called and not replaced: what is hidden is padding for it.

    In training a token that is hidden gives no gradient to the choice that hid it, except by the router's price.
    """

    def call(self, stack, depth, x, shown=ALL):
        if shown.visible is None:
            return super().call(stack, depth, x)
        visible = (shown.visible.t() > 0) & self.tokens
        mask = ~visible & visible.any(1, keepdim=True)  # where nothing is seen, and nothing is wanted: no NaN
        out = stack.call(depth, x, **{**self.arguments(stack, depth, x, ALL), "encoder_padding_mask": mask})
        out = out[0] if isinstance(out, tuple) else out
        return torch.where(visible.t().unsqueeze(-1), out.to(x.dtype), x), None


class PlainDecoderContext(DecoderContext):
    """:class:`DecoderContext` under attention that is called and not replaced, as in :class:`PlainContext`."""

    def __init__(self, x, padding_mask, where, weights_at):
        super().__init__(x, padding_mask, where, weights_at)
        self.runs_all = where["incremental_state"] is not None  # each depth has a cache

    def call(self, stack, depth, x, shown=ALL):
        if shown.visible is None:
            return super().call(stack, depth, x)
        visible = (shown.visible > 0) & self.running
        # what is hidden comes last: later than all that is seen, so that it sees something itself
        order = (~visible).byte().argsort(dim=0, stable=True)
        mask = (~visible & visible.any(0)).gather(0, order).t()
        there, back = order.unsqueeze(-1).expand_as(x), order.argsort(dim=0)
        arguments = {**self.arguments(stack, depth, x, ALL), "self_attn_padding_mask": mask if mask.any() else None}
        if self._where["incremental_state"] is not None:
            arguments["self_attn_padding_mask"] = ~visible.t() if not visible.all() else None
        out, weights, *_ = stack.call(depth, x.gather(0, there), **arguments)
        out = out.gather(0, back.unsqueeze(-1).expand_as(out))
        if weights is not None:  # H x B x T x S
            weights = weights.gather(2, back.t()[None, :, :, None].expand_as(weights))
        return torch.where(visible.unsqueeze(-1), out, x), weights if depth in self._weights_at else None


def past_length(stack, incremental_state: Dict) -> int:
    """How many tokens of each sentence the caches of a decoder have."""
    cache = stack[0].self_attn._get_input_buffer(stack[0].depth_cache(incremental_state, 0))
    return cache["prev_key"].size(2) if "prev_key" in cache else 0


def encoder_context(stack, x: Tensor, padding_mask: Optional[Tensor], tape_len: int = 0, read=None) -> Context:
    """The context of a dense run of encoder layers."""
    if not (stack.adaptive or stack.training or tape_len):
        layers = native_layers(stack, x)
        if layers is not None:
            return NativeContext(x, padding_mask, layers)
    if stack.router is not None or stack.halting_kv != "recompute" or stack.without_padding:
        if stack.changed is not None:
            return PlainContext(x, padding_mask, tape_len)
        return TokenContext(x, padding_mask, tape_len, kv=stack.kv)
    if read is not None and stack.halting is None and not (stack.training or torch.is_grad_enabled()):
        return TapeContext(x, padding_mask, read)
    return Context(x, padding_mask, tape_len)


def every_state(context: Context, states: List[Tensor], merges: Sequence[Merges] = ()) -> Tensor:
    """The states of all depths, one after the other in the batch; ``merges``: what stood for what at each."""
    states = [context.finish(each) for each in states]
    states = [each.spread(state) for each, state in zip(merges, states, strict=True)] if merges else states
    return torch.cat(states, context.batch_dim)

"""Attention of the tokens that still run over all tokens, in inference.

States are rows: token t of sequence b is row b T + t of B T. Queries are those of the R running rows. The keys and
values of a token are kept, for every layer that has made them, until its state changes: those of a halted token are
computed once per layer, which is exact.
"""

from typing import Dict, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_adaptive.modules.packing import Groups


def _heads(x: Tensor, attention) -> Tensor:
    """B x S x C -> B x H x S x D"""
    return x.unflatten(-1, (attention.num_heads, attention.head_dim)).transpose(1, 2)


def _attend(attention, x: Tensor, groups: Groups, keys: Tensor, values: Tensor, mask: Optional[Tensor]) -> Tensor:
    """R x C over G x H x S x D; ``mask`` is G x 1 x (1 or Q) x S, true at the keys to see."""
    queries = _heads(groups.pad(attention.q_proj(x)), attention)
    out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
    return attention.out_proj(groups.unpad(out.transpose(1, 2).flatten(2)))


class PackedSelfAttention:
    """Self-attention within sequences that are wholly there.

    Args:
        states: B T x C, the states of all tokens; the run changes it in place and says so to :meth:`changed`
        tokens: B x T, false at padding
        causal: a token sees itself and those before it
    """

    def __init__(self, states: Tensor, tokens: Tensor, causal: bool = False):
        self.states, self.tokens, self.causal = states, tokens, causal
        self._padded = not bool(tokens.all())
        self._projected: Dict[int, Tuple[Tensor, Tensor, Tensor]] = {}  # keys, values: B T x C; fresh: B T

    def changed(self, rows: Tensor):
        """Say that the states of ``rows`` (R) are new."""
        for _, _, fresh in self._projected.values():
            fresh[rows] = False

    def project(self, number: int, layer, rows: Tensor, x: Optional[Tensor]) -> Tuple[Tensor, Tensor]:
        """Keys and values of all tokens, B T x C.

        Args:
            number: of the layer
            rows: R, the running rows
            x: R x C, what the layer's attention reads there; None where nothing runs
        """
        attention = layer.self_attn
        if number not in self._projected:
            like = self.states if x is None else attention.k_proj(x[:0])
            keys, values = (like.new_zeros(self.states.shape) for _ in range(2))
            self._projected[number] = keys, values, ~self.tokens.flatten()
        keys, values, fresh = self._projected[number]
        if x is not None:
            keys.index_copy_(0, rows, attention.k_proj(x))
            values.index_copy_(0, rows, attention.v_proj(x))
            fresh[rows] = True
        halted = (~fresh).nonzero().squeeze(1)
        if halted.numel():
            x = self.states.index_select(0, halted)
            x = layer.self_attn_layer_norm(x) if layer.normalize_before else x
            keys.index_copy_(0, halted, attention.k_proj(x).to(keys.dtype))
            values.index_copy_(0, halted, attention.v_proj(x).to(keys.dtype))
            fresh[halted] = True
        return keys, values

    def __call__(self, x: Tensor, number: int, layer, depth: int, rows: Tensor, groups: Groups) -> Tensor:
        """R x C -> R x C."""
        batch, length = self.tokens.shape
        keys, values = (
            groups.select(_heads(each.unflatten(0, (batch, length)), layer.self_attn))
            for each in self.project(number, layer, rows, x)
        )
        mask = groups.select(self.tokens)[:, None, None] if self._padded else None
        if self.causal:
            place = groups.pad(rows % length)  # G x Q
            seen = torch.arange(length, device=x.device) <= place[:, None, :, None]
            mask = seen if mask is None else seen & mask
        return _attend(layer.self_attn, x, groups, keys, values, mask)

    def finish(self, stack):
        """Called when all tokens have halted."""


class StepSelfAttention(PackedSelfAttention):
    """Self-attention of one step of incremental decoding, T = 1, over the tokens of the steps before.

    A later token may go deeper than this one: every depth's cache gets keys and values of every token. The caches have
    fairseq's names and layout, so that beam search reorders them.

    Args:
        states, tokens: as above, with T = 1
        incremental_state: fairseq's caches, changed in place
    """

    def __init__(self, states: Tensor, tokens: Tensor, incremental_state: Dict):
        super().__init__(states, tokens)
        self._incremental_state, self._ran = incremental_state, 0

    def append(self, number: int, layer, depth: int, rows: Tensor, x: Optional[Tensor]) -> Dict[str, Tensor]:
        """Add this step to the cache of a depth, and return it."""
        self._ran = depth + 1
        state = layer.depth_cache(self._incremental_state, depth)
        cache = layer.self_attn._get_input_buffer(state)
        keys, values = (_heads(each.unsqueeze(1), layer.self_attn) for each in self.project(number, layer, rows, x))
        for name, new in (("prev_key", keys), ("prev_value", values)):
            cache[name] = torch.cat((cache[name], new), 2) if name in cache else new.clone()
        past = cache.get("prev_key_padding_mask")
        if self._padded or past is not None:
            if past is None:
                past = self.tokens.new_zeros((self.tokens.size(0), cache["prev_key"].size(2) - 1))
            cache["prev_key_padding_mask"] = torch.cat((past, ~self.tokens), 1)
        layer.self_attn._set_input_buffer(state, cache)
        return cache

    def __call__(self, x: Tensor, number: int, layer, depth: int, rows: Tensor, groups: Groups) -> Tensor:
        cache = self.append(number, layer, depth, rows, x)
        padding = cache.get("prev_key_padding_mask")
        mask = None if padding is None else ~groups.select(padding)[:, None, None]
        keys, values = (groups.select(cache[name]) for name in ("prev_key", "prev_value"))
        return _attend(layer.self_attn, x, groups, keys, values, mask)

    def finish(self, stack):
        for depth in range(self._ran, len(stack)):
            self.append(stack.schedule[depth], stack[depth], depth, self.tokens.new_zeros(0, dtype=torch.long), None)


class PackedCrossAttention:
    """Attention of running rows over the source; its keys and values are computed once per layer.

    Args:
        encoder_out: S x B x C
        padding_mask: B x S, true at padding
        incremental_state: where they are kept from step to step, with fairseq's names and layout
        need_weights: keep the attention weights of the last depth of every token
        length: T
        batch: B
    """

    def __init__(self, encoder_out, padding_mask, incremental_state, need_weights: bool, length: int, batch: int):
        self._source, self._padding_mask = encoder_out, padding_mask
        # fairseq keeps keys and values once per sentence, not per hypothesis, in incremental decoding only
        self._beams = incremental_state is not None
        self._state = {} if incremental_state is None else incremental_state
        self._need_weights, self._length, self._batch, self._weights = need_weights, length, batch, None

    def head_weights(self) -> Optional[Tensor]:
        """H x B x T x S"""
        if self._weights is None:
            return None
        return self._weights.unflatten(0, (self._batch, self._length)).permute(2, 0, 1, 3)

    def _keys(self, attention):
        cache = attention._get_input_buffer(self._state)
        if "prev_key" not in cache:
            source, padding = self._source, self._padding_mask
            if self._beams and attention.beam_size > 1 and source.size(1) == self._batch:
                source = source[:, :: attention.beam_size]
                padding = None if padding is None else padding[:: attention.beam_size]
            source = source.transpose(0, 1)
            cache["prev_key"] = _heads(attention.k_proj(source), attention)
            cache["prev_value"] = _heads(attention.v_proj(source), attention)
            cache["prev_key_padding_mask"] = padding
            attention._set_input_buffer(self._state, cache)
        padding = cache.get("prev_key_padding_mask")
        return cache["prev_key"], cache["prev_value"], None if padding is None else ~padding.bool()[:, None, None]

    def __call__(self, x: Tensor, layer, rows: Tensor) -> Tensor:
        """R x C -> R x C."""
        attention = layer.encoder_attn
        keys, values, mask = self._keys(attention)
        rows_each = self._batch * self._length // keys.size(0)
        groups = Groups(rows.div(rows_each, rounding_mode="floor"), keys.size(0))
        keys, values = groups.select(keys), groups.select(values)
        mask = None if mask is None else groups.select(mask)
        if self._need_weights:
            scores = _heads(groups.pad(attention.q_proj(x)), attention) @ keys.transpose(2, 3) * keys.size(-1) ** -0.5
            weights = (scores if mask is None else scores.masked_fill(~mask, float("-inf"))).softmax(-1)
            weights = groups.unpad(weights.transpose(1, 2))  # R x H x S
            if self._weights is None:
                self._weights = weights.new_zeros((self._batch * self._length, *weights.shape[1:]))
            self._weights.index_copy_(0, rows, weights)
        return _attend(attention, x, groups, keys, values, mask)

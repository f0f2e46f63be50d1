"""Attention of some target tokens over the source."""

from typing import Optional

from torch import Tensor

from fairseq_adaptive.modules.stack.attention import attend_from, heads
from fairseq_adaptive.modules.stack.packing import Groups


class PackedCrossAttention:
    """Attention of the tokens that run over the source; its keys and values are computed once per layer.

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

    def weights(self) -> Optional[Tensor]:
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
            cache["prev_key"] = heads(attention.k_proj(source), attention)
            cache["prev_value"] = heads(attention.v_proj(source), attention)
            cache["prev_key_padding_mask"] = padding
            attention._set_input_buffer(self._state, cache)
        padding = cache.get("prev_key_padding_mask")
        return cache["prev_key"], cache["prev_value"], None if padding is None else ~padding.bool()[:, None, None]

    def __call__(self, x: Tensor, layer, places: Tensor) -> Tensor:
        """P x C -> P x C."""
        attention = layer.encoder_attn
        keys, values, mask = self._keys(attention)
        each = self._batch * self._length // keys.size(0)
        groups = Groups(places.div(each, rounding_mode="floor"), keys.size(0))
        keys, values = groups.select(keys), groups.select(values)
        mask = None if mask is None else groups.select(mask)
        if self._need_weights:
            scores = heads(groups.pad(attention.q_proj(x)), attention) @ keys.transpose(2, 3) * keys.size(-1) ** -0.5
            weights = (scores if mask is None else scores.masked_fill(~mask, float("-inf"))).softmax(-1)
            weights = groups.unpad(weights.transpose(1, 2))  # P x H x S
            if self._weights is None:
                self._weights = weights.new_zeros((self._batch * self._length, *weights.shape[1:]))
            self._weights.index_copy_(0, places, weights)
        return attend_from(attention, x, groups, keys, values, mask)

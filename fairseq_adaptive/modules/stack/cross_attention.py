"""Attention of some target tokens over the source."""

from typing import Optional

from torch import Tensor

from fairseq_adaptive.modules.stack.attention import attend_from, heads
from fairseq_adaptive.modules.stack.packing import Groups


class PackedCrossAttention:
    """Attention of the tokens that run over the source; its keys and values are computed once per layer, or once per depth
    where the maps of a layer differ from depth to depth.

    Args:
        encoder_out: S x B x C
        padding_mask: B x S, true at padding
        incremental_state: where they are kept from step to step, with fairseq's names and layout
        weights_at: keep the attention weights of the last of these depths at which each token is computed
        length: T
        batch: B
        heads: H
    """

    def __init__(
        self, encoder_out, padding_mask, incremental_state, weights_at: range, length: int, batch: int, heads: int
    ):
        self._source, self._padding_mask = encoder_out, padding_mask
        # fairseq keeps keys and values once per sentence, not per hypothesis, in incremental decoding only
        self._beams = incremental_state is not None
        self._state = {} if incremental_state is None else incremental_state
        self._weights_at, self._length, self._batch, self._heads = weights_at, length, batch, heads
        self._weights = None

    def weights(self) -> Optional[Tensor]:
        """H x B x T x S, zeros of tokens that are computed at none of the depths; None where there are no depths."""
        if not self._weights_at:
            return None
        if self._weights is None:
            return self._source.new_zeros(self._heads, self._batch, self._length, self._source.size(0))
        return self._weights.unflatten(0, (self._batch, self._length)).permute(2, 0, 1, 3)

    def _keys(self, layer, depth):
        attention, state = layer.encoder_attn, layer.source_cache(self._state, depth)
        cache = attention._get_input_buffer(state)
        if "prev_key" not in cache:
            source, padding = self._source, self._padding_mask
            if self._beams and attention.beam_size > 1 and source.size(1) == self._batch:
                source = source[:, :: attention.beam_size]
                padding = None if padding is None else padding[:: attention.beam_size]
            source = source.transpose(0, 1)
            cache["prev_key"] = heads(attention.k_proj(source), attention)
            cache["prev_value"] = heads(attention.v_proj(source), attention)
            cache["prev_key_padding_mask"] = padding
            attention._set_input_buffer(state, cache)
        padding = cache.get("prev_key_padding_mask")
        return cache["prev_key"], cache["prev_value"], None if padding is None else ~padding.bool()[:, None, None]

    def __call__(self, x: Tensor, layer, depth: int, places: Tensor) -> Tensor:
        """P x C -> P x C."""
        attention = layer.encoder_attn
        keys, values, mask = self._keys(layer, depth)
        each = self._batch * self._length // keys.size(0)
        groups = Groups(places.div(each, rounding_mode="floor"), keys.size(0))
        keys, values = groups.select(keys), groups.select(values)
        mask = None if mask is None else groups.select(mask)
        if depth not in self._weights_at:
            return attend_from(attention, x, groups, keys, values, mask)
        scores = heads(groups.pad(attention.q_proj(x)), attention) @ keys.transpose(2, 3) * keys.size(-1) ** -0.5
        weights = (scores if mask is None else scores.masked_fill(~mask, float("-inf"))).softmax(-1)
        out = groups.unpad((weights @ values).transpose(1, 2).flatten(2))
        weights = groups.unpad(weights.transpose(1, 2))  # P x H x S
        if self._weights is None:
            self._weights = weights.new_zeros((self._batch * self._length, *weights.shape[1:]))
        self._weights.index_copy_(0, places, weights)
        return attention.out_proj(out)

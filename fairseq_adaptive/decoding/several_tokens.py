"""Some depths of a decoder over several tokens of each sentence, each sentence at a position of its own."""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_adaptive.decoding.decoder_step import _Layer
from fairseq_adaptive.modules.layers.depth_lora import layers_to_lay_out

_BLOCK = 16  # keys come in whole blocks, as in decoder_step.py


class SeveralTokens:
    """The caches of one search in which a sentence has one hypothesis.

    A token that is run again at a position takes the place of what was there: to go back is to say another position.

    Args:
        stack: a :class:`~fairseq_adaptive.modules.DecoderStack` that
            :class:`~fairseq_adaptive.decoding.decoder_step.DecoderStep` fits, without policies
        sentences: B
        encoder_out: S x B x C', or None
        padding_mask: B x S, true at padding, or None
    """

    def __init__(self, stack, sentences: int, encoder_out: Optional[Tensor], padding_mask: Optional[Tensor]):
        attention = stack[0].self_attn
        self._stack, self._size, self._sentences = stack, (attention.num_heads, attention.head_dim), sentences
        layers, self._schedule = layers_to_lay_out(stack)
        self._layers = [_Layer.of(*each) for each in layers]
        self._source, self._seen = {}, None  # of a layer: keys and values B x H x S x D; B x 1 x 1 x S
        self._cache = None  # N x 2 x B x H x room x D
        if encoder_out is None:
            return
        for number, (layer, depth) in enumerate(layers):
            source = layer.encoder_attn
            if source is not None:
                with layer.running_at(depth):
                    self._source[number] = [
                        self._heads(each(encoder_out.transpose(0, 1))) for each in (source.k_proj, source.v_proj)
                    ]
        if padding_mask is not None and padding_mask.any():
            self._seen = ~padding_mask.bool()[:, None, None]

    def _heads(self, x):
        """B x T x C -> B x H x T x D"""
        return x.unflatten(-1, self._size).transpose(1, 2)

    def _room(self, x, needed):
        have = 0 if self._cache is None else self._cache.size(4)
        if needed > have:
            more = max(2 * have, needed + -needed % _BLOCK) - have
            if self._cache is None:
                self._cache = x.new_zeros(len(self._stack), 2, self._sentences, self._size[0], 0, self._size[1])
            self._cache = F.pad(self._cache, (0, 0, 0, more))

    def __call__(self, x: Tensor, places: Tensor, depths: range) -> Tensor:
        """Run some depths.

        Args:
            x: B x T x C, states before the first of them
            places: B x T, positions; those of a sentence are in their order
            depths: which

        Returns:
            B x T x C
        """
        last = int(places.max()) + 1
        self._room(x, last)
        seen = last + -last % _BLOCK
        seen = min(seen, self._cache.size(4))
        mask = torch.arange(seen, device=x.device) <= places[:, None, :, None]  # B x 1 x T x S
        rows = torch.arange(x.size(0), device=x.device).unsqueeze(1)
        for depth in depths:
            x = self._layer(x, depth, rows, places, seen, mask)
        return x

    def _layer(self, x, depth, rows, places, seen, mask):
        number, add, sublayer = self._schedule[depth], self._stack.residual, 0
        layer = self._layers[number]
        for kind, norm in enumerate(layer.norms):
            if kind == 1 and number not in self._source:
                continue
            y = F.layer_norm(x, *norm) if layer.pre_norm else x
            if kind == 0:
                queries, *new = layer.project(y).to(x.dtype).chunk(3, -1)
                for cache, each in zip(self._cache[depth], new):
                    cache.transpose(1, 2)[rows, places] = each.unflatten(-1, self._size)
                keys, values = (cache[:, :, :seen] for cache in self._cache[depth])
                y = layer.out(self._attend(queries, keys, values, mask))
            elif kind == 1:
                y = layer.out_source(self._attend(layer.query_source(y), *self._source[number], self._seen))
            else:
                y = layer.fc2(layer.activation(layer.fc1(y)))
            x = x + y if add is None else add(y, x, depth, sublayer, None)
            x = x if layer.pre_norm else F.layer_norm(x, *norm)
            sublayer += 1
        return x

    def _attend(self, queries, keys, values, mask):
        out = F.scaled_dot_product_attention(self._heads(queries), keys, values, attn_mask=mask)
        return out.transpose(1, 2).flatten(2)

    def keep(self, rows: Tensor):
        """Go on with some of the sentences, R of B."""
        self._sentences = len(rows)
        self._cache = self._cache.index_select(2, rows)
        self._source = {number: [each.index_select(0, rows) for each in pair] for number, pair in self._source.items()}
        self._seen = None if self._seen is None else self._seen.index_select(0, rows)

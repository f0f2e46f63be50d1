"""fairseq's attention with fast paths for short sequences on a CPU and for one step of incremental decoding."""

from typing import Dict, Optional, Tuple

import torch
import torch.nn.functional as F
from fairseq.modules import MultiheadAttention
from torch import Tensor

from fairseq_adaptive.modules.layers.int8_linear import Int8Linear, project
from fairseq_adaptive.modules.layers.known import known
from fairseq_adaptive.modules.layers.prepacked_linear import LINEARS

LONGEST = 128  # from here on torch's fused attention is as fast in fp32, and needs less memory


def _attend(queries, keys, values, mask):
    """Attention of B x H x T x D over B x H x S x D; ``mask`` is true at the keys to see."""
    if keys.is_cuda or keys.numel() < 2**16:
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
    # on a CPU the fused kernel loses to two batched products as soon as its low overhead no longer counts
    scores = torch.matmul(queries * queries.size(-1) ** -0.5, keys.transpose(2, 3))
    if mask is not None:
        scores = scores.masked_fill_(~mask, float("-inf"))
    return torch.matmul(scores.softmax(-1), values)


@known
class FastAttention(MultiheadAttention):
    """:class:`fairseq.modules.MultiheadAttention`, faster where training on a CPU and beam search spend their time.

    *Short sequences* on a CPU are two batched products. There torch's fused kernel takes up to twice as long in fp32, and
    six times as long in bfloat16, most of it in the backward pass.

    *One query per row against cached keys and values* is a single fused call instead of a dozen small ones. Cross-attention
    keeps keys and values once per sentence, and its beams are the queries of one attention. Caches have fairseq's layout, so
    that a step may take either path.

    *Projections in int8* are called at any length, by the first way or, where no weights are asked for, by the fused kernel:
    fairseq's path reads their weights.

    Whatever is plain neither way takes fairseq's path.
    """

    def forward(
        self,
        query: Tensor,
        key: Optional[Tensor],
        value: Optional[Tensor],
        key_padding_mask: Optional[Tensor] = None,
        incremental_state: Optional[Dict] = None,
        need_weights: bool = True,
        static_kv: bool = False,
        attn_mask: Optional[Tensor] = None,
        before_softmax: bool = False,
        need_head_weights: bool = False,
    ) -> Tuple[Tensor, Optional[Tensor]]:
        """As in fairseq: ``query`` T x B x C, ``key`` and ``value`` S x B x C, the result T x B x C and the weights, before
        dropout: H x B x T x S with ``need_head_weights``, their mean B x T x S with ``need_weights``, or None."""
        cache = None if incremental_state is None else self._get_input_buffer(incremental_state)
        lean = (
            cache  # the first step fills the cache, in fairseq's way
            and "prev_key" in cache
            and query.size(0) == 1
            and not (need_weights or need_head_weights or before_softmax or self.training or self.onnx_trace)
            and attn_mask is None
            and (static_kv or (key_padding_mask is None and cache.get("prev_key_padding_mask") is None))
            and (static_kv or key is query)
        )
        if lean:
            return self._step(query, cache, static_kv), None
        short = (
            query.device.type == "cpu"
            and incremental_state is None
            and key is not None
            and not before_softmax
            and self.bias_k is None
            and not (self.use_xformers or self.add_zero_attn or self.onnx_trace or torch.jit.is_scripting())
            and (attn_mask is None or attn_mask.dim() == 2)
            and (query.size(0) * key.size(0) <= LONGEST**2 or self._in_int8)
        )
        if not short:
            # torch's fused function reads the weights of maps; fairseq calls them where keys are said to be static
            called = incremental_state is None and not self.has_plain_maps
            return super().forward(
                query,
                key,
                value,
                key_padding_mask,
                incremental_state,
                need_weights,
                static_kv or called,
                attn_mask,
                before_softmax,
                need_head_weights,
            )
        return self._short(query, key, value, key_padding_mask, attn_mask, need_weights, need_head_weights)

    @torch.jit.unused
    @property
    def has_plain_maps(self) -> bool:
        """Whether the maps are what their weights say, and nothing more."""
        return all(type(each) in LINEARS for each in (self.q_proj, self.k_proj, self.v_proj, self.out_proj))

    @torch.jit.unused
    @property
    def _in_int8(self):
        return any(type(each) is Int8Linear for each in (self.q_proj, self.k_proj, self.v_proj, self.out_proj))

    def _step(self, query, cache, static_kv):
        """1 x B x C against a cache, which gets the new keys and values; the result alike."""
        keys, values, mask = cache["prev_key"], cache["prev_value"], None
        if static_kv:
            mask = self._source_mask(cache)
        else:
            keys = cache["prev_key"] = torch.cat((keys, self._heads(self.k_proj(query))), 2)
            values = cache["prev_value"] = torch.cat((values, self._heads(self.v_proj(query))), 2)
        sentences = keys.size(0)
        # the beams of a sentence, 1 x (B beams) x C, are the queries of one attention: B x H x beams x D
        queries = self.q_proj(query).view(sentences, -1, self.num_heads, self.head_dim).transpose(1, 2)
        out = _attend(queries, keys, values, mask)
        return self.out_proj(out.transpose(1, 2).reshape(query.shape))

    def _short(self, query, key, value, key_padding_mask, attn_mask, need_weights, need_head_weights):
        """Both products of all heads at once."""
        length, sentences, _ = query.shape
        if key is query and value is query:
            queries, keys, values = map(self._rows, project(query, self.q_proj, self.k_proj, self.v_proj))
        else:
            queries, keys, values = map(self._rows, (self.q_proj(query), self.k_proj(key), self.v_proj(value)))
        mask = _additive(key_padding_mask, attn_mask, queries.dtype)
        if length * keys.size(1) > LONGEST**2 and not (need_weights or need_head_weights or self.training):
            parts = (each.unflatten(0, (sentences, -1)) for each in (queries, keys, values))
            out = F.scaled_dot_product_attention(*parts, attn_mask=mask, scale=self.scaling).flatten(0, 1)
            return self.out_proj(out.transpose(0, 1).reshape(length, sentences, -1)), None
        scores = torch.bmm(queries * self.scaling, keys.transpose(1, 2))  # BH x T x S
        if mask is not None:
            by_sentence = scores.view(sentences, self.num_heads, *scores.shape[1:])
            # what is written through a view is lost in torch.onnx.export(dynamo=False)
            scores = (
                (by_sentence + mask).view_as(scores)
                if torch.jit.is_tracing()
                else by_sentence.add_(mask).view_as(scores)
            )
        weights = scores.softmax(-1, dtype=scores.dtype)
        out = torch.bmm(self.dropout_module(weights), values)
        out = self.out_proj(out.transpose(0, 1).reshape(length, sentences, -1))
        if not (need_weights or need_head_weights):
            return out, None
        weights = weights.view(sentences, self.num_heads, *weights.shape[1:]).transpose(0, 1)
        return out, weights if need_head_weights else weights.mean(0)

    def _rows(self, x):
        """T x B x C to BH x T x D."""
        return x.reshape(len(x), -1, self.head_dim).transpose(0, 1)

    def _heads(self, x):
        return x.view(x.size(1), self.num_heads, 1, self.head_dim)  # 1 x B x C -> B x H x 1 x D

    @staticmethod
    def _source_mask(cache) -> Optional[Tensor]:
        """True at source tokens, B x 1 x 1 x S; kept in the cache, where it is reordered like the keys."""
        if "source_mask" not in cache:
            padding = cache.get("prev_key_padding_mask")
            cache["source_mask"] = None if padding is None else ~padding.bool()[:, None, None]
        return cache["source_mask"]


def _additive(key_padding_mask, attn_mask, dtype):
    """One mask that is added to scores, T x S or B x 1 x (1 or T) x S, or None.

    A query that may see nothing, as padding may, gets the mean of what is hidden from it and not NaN.
    """
    hidden = torch.finfo(dtype).min
    if attn_mask is not None:
        kind = torch.zeros(attn_mask.shape, dtype=dtype, device=attn_mask.device)
        attn_mask = kind.masked_fill_(attn_mask, hidden) if attn_mask.dtype == torch.bool else attn_mask.to(dtype)
    if key_padding_mask is None:
        return attn_mask
    padding = torch.zeros(key_padding_mask.shape, dtype=dtype, device=key_padding_mask.device)
    padding = padding.masked_fill_(key_padding_mask.bool(), hidden)[:, None, None]
    return padding if attn_mask is None else padding + attn_mask

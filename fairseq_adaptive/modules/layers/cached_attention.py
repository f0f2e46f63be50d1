"""fairseq's attention with a lean path for one step of incremental decoding."""

from typing import Dict, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_adaptive.modules.layers.known import known
from fairseq_adaptive.modules.layers.short_attention import ShortAttention


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
class CachedAttention(ShortAttention):
    """:class:`ShortAttention`, faster where beam search spends its time.

    One query per row against cached keys and values is a single fused call here instead of a dozen small ones. Cross-
    attention keeps keys and values once per sentence, and its beams are the queries of one attention. Caches have
    fairseq's layout, so that a step may take either path; whatever is not plain cached attention takes fairseq's.
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
        """As in fairseq: ``query`` is T x B x C, ``key`` and ``value`` S x B x C, the result T x B x C and the weights."""
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
        if not lean:
            return super().forward(
                query,
                key,
                value,
                key_padding_mask,
                incremental_state,
                need_weights,
                static_kv,
                attn_mask,
                before_softmax,
                need_head_weights,
            )
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
        return self.out_proj(out.transpose(1, 2).reshape(query.shape)), None

    def _heads(self, x):
        return x.view(x.size(1), self.num_heads, 1, self.head_dim)  # 1 x B x C -> B x H x 1 x D

    @staticmethod
    def _source_mask(cache) -> Optional[Tensor]:
        """True at source tokens, B x 1 x 1 x S; kept in the cache, where it is reordered like the keys."""
        if "source_mask" not in cache:
            padding = cache.get("prev_key_padding_mask")
            cache["source_mask"] = None if padding is None else ~padding.bool()[:, None, None]
        return cache["source_mask"]

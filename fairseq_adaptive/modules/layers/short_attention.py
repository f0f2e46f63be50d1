"""fairseq's attention with a fast path for short sequences on a CPU."""

from typing import Dict, Optional, Tuple

import torch
from fairseq.modules import MultiheadAttention
from torch import Tensor

from fairseq_adaptive.modules.layers.known import known

LONGEST = 128  # from here on torch's fused attention is as fast in fp32, and needs less memory


@known
class ShortAttention(MultiheadAttention):
    """:class:`fairseq.modules.MultiheadAttention`, with sentences on a CPU as two batched products.

    There torch's fused kernel takes up to twice as long in fp32, and six times as long in bfloat16, most of it in the
    backward pass. Whatever is not plain attention of a whole sequence takes fairseq's path.
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
        short = (
            query.device.type == "cpu"
            and incremental_state is None
            and key is not None
            and not before_softmax
            and self.bias_k is None
            and not (self.use_xformers or self.add_zero_attn or self.onnx_trace or torch.jit.is_scripting())
            and (attn_mask is None or attn_mask.dim() == 2)
            and query.size(0) * key.size(0) <= LONGEST**2
        )
        if not short:
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
        length, sentences, _ = query.shape
        queries = self._rows(self.q_proj(query) * self.scaling)
        scores = torch.bmm(queries, self._rows(self.k_proj(key)).transpose(1, 2))  # BH x T x S
        mask = _additive(key_padding_mask, attn_mask, scores.dtype)
        if mask is not None:
            by_sentence = scores.view(sentences, self.num_heads, *scores.shape[1:])
            # what is written through a view is lost in torch.onnx.export(dynamo=False)
            scores = (
                (by_sentence + mask).view_as(scores)
                if torch.jit.is_tracing()
                else by_sentence.add_(mask).view_as(scores)
            )
        weights = scores.softmax(-1, dtype=scores.dtype)
        out = torch.bmm(self.dropout_module(weights), self._rows(self.v_proj(value)))
        out = self.out_proj(out.transpose(0, 1).reshape(length, sentences, -1))
        if not (need_weights or need_head_weights):
            return out, None
        weights = weights.view(sentences, self.num_heads, *weights.shape[1:]).transpose(0, 1)
        return out, weights if need_head_weights else weights.mean(0)

    def _rows(self, x):
        """T x B x C to BH x T x D."""
        return x.reshape(len(x), -1, self.head_dim).transpose(0, 1)


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

"""The stack of a decoder's layers."""

from typing import Dict, List, Optional, Tuple

import torch
from torch import Tensor

from fairseq_adaptive.modules.stack.context import DecoderContext, PlainDecoderContext
from fairseq_adaptive.modules.stack.cross_attention import PackedCrossAttention
from fairseq_adaptive.modules.stack.packed_context import ActiveContext, PackedContext, StepContext
from fairseq_adaptive.modules.stack.run import run_dense, run_packed
from fairseq_adaptive.modules.stack.stack import LayerStack
from fairseq_adaptive.modules.tracing import refuse_tracing


class DecoderStack(LayerStack):
    """:class:`LayerStack` of decoder layers."""

    positioned = True
    unmergeable = "a token of a causal decoder would hold later ones; take an encoder (--encoder-router)"

    def forward(
        self,
        x: Tensor,
        encoder_out: Optional[Tensor] = None,
        encoder_padding_mask: Optional[Tensor] = None,
        incremental_state: Optional[Dict] = None,
        self_attn_mask: Optional[Tensor] = None,
        self_attn_padding_mask: Optional[Tensor] = None,
        weights_at: Optional[int] = None,
        states: Optional[List[Tensor]] = None,
    ) -> Tuple[Tensor, Optional[Tensor]]:
        """Run decoder layers until no token is left to compute, or all layers have run.

        Args:
            x, encoder_out, encoder_padding_mask, incremental_state, self_attn_mask, self_attn_padding_mask: of
                :class:`~fairseq_adaptive.modules.DecoderLayer`; a router's choices are causal where there is a
                ``self_attn_mask`` or an ``incremental_state``
            weights_at: return the attention weights of this depth; of a stack with policies those of the last depth, up to
                this one, at which each token is computed, zeros where there is none
            states: takes the states after each depth; then all tokens are computed

        Returns:
            T x B x C, and attention weights, H x B x T x S, or None
        """
        if self.adaptive:
            refuse_tracing()
        where = {
            "encoder_out": encoder_out,
            "encoder_padding_mask": encoder_padding_mask,
            "incremental_state": incremental_state,
            "self_attn_mask": self_attn_mask,
        }
        wanted = range(0) if weights_at is None else range(0 if self.adaptive else weights_at, weights_at + 1)
        plain = self.adaptive and self.changed is not None
        if plain or not self.adaptive or (incremental_state is None and not self._packed_now()):
            context = (
                PlainDecoderContext(x, self_attn_padding_mask, where, wanted)
                if plain
                else DecoderContext(x, self_attn_padding_mask, where, wanted, self.kv)
            )
            out = run_dense(self, context, states=states)
            self._record_source(encoder_out, encoder_padding_mask)
            return out, context.weights
        cross = None
        if encoder_out is not None and self[0].encoder_attn is not None:
            size = x.size(0), x.size(1), self[0].encoder_attn.num_heads
            cross = PackedCrossAttention(encoder_out, encoder_padding_mask, incremental_state, wanted, *size)
        if incremental_state is not None:
            context = StepContext(x, self_attn_padding_mask, incremental_state, cross, self.kv)
        else:
            kind = PackedContext if self.sees_others else ActiveContext
            context = kind(x, self_attn_padding_mask, self_attn_mask is not None, cross, kv=self.kv)
        out = run_packed(self, context)
        self._record_source(encoder_out, encoder_padding_mask)
        return out, None if cross is None else cross.weights()

    def _record_source(self, encoder_out, padding_mask):
        if self.recorder is not None and encoder_out is not None:
            length, batch = encoder_out.shape[:2]
            every = torch.full((batch,), length, device=encoder_out.device)
            self.recorder[-1].source = every if padding_mask is None else every - padding_mask.bool().sum(1)

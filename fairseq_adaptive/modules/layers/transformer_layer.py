"""fairseq's Transformer layers, made to serve several depths.

Parameters, names and arithmetic are those of :mod:`fairseq.modules.transformer_layer`. What differs: a layer is told at
which depth it runs, keeps one self-attention cache per depth, and lets the stack decide how a branch is added to its
input. Tensors are T x B x C.
"""

from typing import Callable, Dict, Optional, Tuple

import torch
import torch.nn.functional as F
from fairseq.modules import FairseqDropout, gelu
from fairseq.modules.transformer_layer import TransformerDecoderLayerBase, TransformerEncoderLayerBase
from torch import Tensor

from fairseq_adaptive.modules.layers.attends import Attends
from fairseq_adaptive.modules.layers.attention import FastAttention
from fairseq_adaptive.modules.layers.dropout import FastDropout
from fairseq_adaptive.modules.layers.known import hooked, known
from fairseq_adaptive.modules.layers.native_layer import Parts
from fairseq_adaptive.modules.layers.prepacked_linear import PrepackedLinear
from fairseq_adaptive.modules.layers.residual import FUSABLE, run_sublayers
from fairseq_adaptive.modules.layers.zero_gradients import zero_gradients
from fairseq_adaptive.modules.policies.tape import GatedMLP


@known
class EncoderLayer(Attends, TransformerEncoderLayerBase):
    """Self-attention and feed-forward at one of the depths of a stack.

    Args:
        cfg: :class:`fairseq.models.transformer.TransformerConfig`; where it has a ``tape_ffn_embed_dim``, tape tokens
            get a second feed-forward of that width (Xue et al., 2023, section 3.3)
    """

    native = Parts((FairseqDropout, FastDropout, *FUSABLE), {F.relu: "relu", F.gelu: "gelu", gelu: "gelu"})

    def __init__(self, cfg, return_fc=False):
        super().__init__(cfg, return_fc)
        tape_ffn_embed_dim = getattr(cfg, "tape_ffn_embed_dim", 0)
        self.tape_ffn = None
        if tape_ffn_embed_dim:
            self.tape_ffn = GatedMLP(self.embed_dim, tape_ffn_embed_dim, cfg.activation_dropout)
        PrepackedLinear.adopt(self)

    def build_self_attention(self, embed_dim, cfg):
        return FastAttention(
            embed_dim,
            cfg.encoder.attention_heads,
            dropout=cfg.attention_dropout,
            self_attention=True,
            q_noise=self.quant_noise,
            qn_block_size=self.quant_noise_block_size,
            xformers_att_config=cfg.encoder.xformers_att_config,
        )

    def forward(
        self,
        x: Tensor,
        encoder_padding_mask: Optional[Tensor] = None,
        attn_mask: Optional[Tensor] = None,
        depth: int = 0,
        residual: Optional[Callable] = None,
        tape_len: int = 0,
        self_attention: Optional[Callable] = None,
        tape: Optional[Tensor] = None,
    ) -> Tensor:
        """
        Args:
            x: T x B x C
            encoder_padding_mask: B x T, true at padding
            attn_mask: T x T, true (or non-zero) where the query of a row must not see the key of a column
            depth: at which depth the layer runs
            residual: ``residual(branch, x, depth, sublayer, padding_mask)``, default ``x + branch``
            tape_len: how many states at the end are tape tokens, which a ``tape_ffn`` serves where there is one
            self_attention: takes the place of ``self_attn``, ... x C -> ... x C, in any layout of ``x``
            tape: takes the place of ``tape_len`` where states are packed, P x C: P, true at tape tokens

        Returns:
            T x B x C
        """
        if attn_mask is not None:
            attn_mask = attn_mask.bool()

        def attend(x):
            x, _ = self.self_attn(x, x, x, encoder_padding_mask, need_weights=False, attn_mask=attn_mask)
            return x

        def feed_forward(x):
            if tape_len and self.tape_ffn is not None:
                return torch.cat((self._feed_forward(x[:-tape_len]), self.tape_ffn(x[-tape_len:])))
            if tape is not None and self.tape_ffn is not None:
                order, count = tape.argsort(stable=True), int((~tape).sum())
                x = x.index_select(0, order)
                x = torch.cat((self._feed_forward(x[:count]), self.tape_ffn(x[count:])))
                return x.index_select(0, order.argsort())
            x = self._feed_forward(x)
            # before the tape is read: no parameter may lack a gradient
            return zero_gradients(x, self.tape_ffn) if self.training and self.tape_ffn is not None else x

        sublayers = [(self.self_attn_layer_norm, self_attention or attend), (self.final_layer_norm, feed_forward)]
        with self.running_at(depth):
            return run_sublayers(self, x, sublayers, depth, residual, encoder_padding_mask)

    def _feed_forward(self, x):
        return self.fc2(self.activation_dropout_module(self.activation_fn(self.fc1(x))))


@known
class DecoderLayer(Attends, TransformerDecoderLayerBase):
    """Masked self-attention, cross-attention and feed-forward at one of the depths of a stack.

    In incremental decoding every depth has a self-attention cache of its own. Where the maps of a layer are the same at
    all of its depths, the keys and values of cross-attention do not depend on the depth: they are computed at the first
    depth that the layer serves and kept for the others.

    Args:
        cfg: :class:`fairseq.models.transformer.TransformerConfig`
        no_encoder_attn: without cross-attention (language models)
    """

    def __init__(self, cfg, no_encoder_attn=False, add_bias_kv=False, add_zero_attn=False):
        super().__init__(cfg, no_encoder_attn, add_bias_kv, add_zero_attn)
        PrepackedLinear.adopt(self)

    def build_self_attention(self, embed_dim, cfg, add_bias_kv=False, add_zero_attn=False):
        return FastAttention(
            embed_dim,
            cfg.decoder.attention_heads,
            dropout=cfg.attention_dropout,
            add_bias_kv=add_bias_kv,
            add_zero_attn=add_zero_attn,
            self_attention=not cfg.cross_self_attention,
            q_noise=self.quant_noise,
            qn_block_size=self.quant_noise_block_size,
            xformers_att_config=cfg.decoder.xformers_att_config,
        )

    def build_encoder_attention(self, embed_dim, cfg):
        return FastAttention(
            embed_dim,
            cfg.decoder.attention_heads,
            kdim=cfg.encoder.embed_dim,
            vdim=cfg.encoder.embed_dim,
            dropout=cfg.attention_dropout,
            encoder_decoder_attention=True,
            q_noise=self.quant_noise,
            qn_block_size=self.quant_noise_block_size,
            xformers_att_config=cfg.encoder.xformers_att_config,
        )

    def forward(
        self,
        x: Tensor,
        encoder_out: Optional[Tensor] = None,
        encoder_padding_mask: Optional[Tensor] = None,
        incremental_state: Optional[Dict] = None,
        self_attn_mask: Optional[Tensor] = None,
        self_attn_padding_mask: Optional[Tensor] = None,
        need_attn: Optional[bool] = False,
        need_head_weights: bool = False,
        depth: int = 0,
        residual: Optional[Callable] = None,
        self_attention: Optional[Callable] = None,
        cross_attention: Optional[Callable] = None,
    ) -> Tuple[Tensor, Optional[Tensor], None]:
        """
        Args:
            x: T x B x C, with T = 1 in incremental decoding
            encoder_out: S x B x C
            encoder_padding_mask: B x S, true at padding
            incremental_state: caches of all modules and depths, changed in place
            self_attn_mask: T x T, added to the scores (-inf above the diagonal)
            self_attn_padding_mask: B x T, true at padding
            need_attn: return the cross-attention weights, B x T x S; False: in evaluation alone, as fairseq's layers do unless
                they were prepared for generation; None: they are not wanted, and made only where a hook may see them
            need_head_weights: return them for each head, H x B x T x S
            depth: at which depth the layer runs
            residual: ``residual(branch, x, depth, sublayer, padding_mask)``, default ``x + branch``
            self_attention: takes the place of ``self_attn``, ... x C -> ... x C, in any layout of ``x``
            cross_attention: likewise of ``encoder_attn``

        Returns:
            T x B x C, cross-attention weights or None, None (fairseq's place for ONNX states)
        """
        weights = None

        def attend(x):
            if self_attention is not None:
                return self._scale_attention(self_attention(x))
            return self._self_attention(
                x, encoder_out, encoder_padding_mask, incremental_state, self_attn_mask, self_attn_padding_mask, depth
            )

        def attend_encoder(x):
            nonlocal weights
            wanted = need_attn or need_head_weights
            if not wanted and self.need_attn and not self.training:
                wanted = need_attn is not None or hooked(self, *self.encoder_attn.modules())
            x, weights = self.encoder_attn(
                x,
                encoder_out,
                encoder_out,
                encoder_padding_mask,
                incremental_state=None if incremental_state is None else self.source_cache(incremental_state, depth),
                # fairseq's fused path averages the weights of heads, and gives them after dropout
                static_kv=incremental_state is not None or wanted,
                need_weights=wanted,
                need_head_weights=need_head_weights,
            )
            return x

        def feed_forward(x):
            x = self.activation_dropout_module(self.activation_fn(self.fc1(x)))
            if self.ffn_layernorm is not None:
                x = self.ffn_layernorm(x)
            return self.fc2(x)

        sublayers = [(self.self_attn_layer_norm, attend)]
        if self.encoder_attn is not None and (encoder_out is not None or cross_attention is not None):
            sublayers.append((self.encoder_attn_layer_norm, cross_attention or attend_encoder))
        sublayers.append((self.final_layer_norm, feed_forward))
        with self.running_at(depth):
            x = run_sublayers(self, x, sublayers, depth, residual, self_attn_padding_mask, skip_weight=self.w_resid)
        return x, weights, None

    def _self_attention(self, x, encoder_out, encoder_padding_mask, incremental_state, mask, padding_mask, depth):
        cache = None
        if incremental_state is not None:
            cache = self.depth_cache(incremental_state, depth)
        keys = x
        if self.cross_self_attention and "prev_key" not in self.self_attn._get_input_buffer(cache):
            # Peitz et al. (2019): one attention over source and target; in decoding the cache holds the source
            keys = torch.cat((encoder_out, x))
            if mask is not None:
                mask = torch.cat((mask.new_zeros(x.size(0), encoder_out.size(0)), mask), dim=1)
            if padding_mask is not None:
                if encoder_padding_mask is None:
                    encoder_padding_mask = padding_mask.new_zeros(encoder_out.size(1), encoder_out.size(0))
                padding_mask = torch.cat((encoder_padding_mask, padding_mask), dim=1)
        x, _ = self.self_attn(x, keys, keys, padding_mask, incremental_state=cache, need_weights=False, attn_mask=mask)
        return self._scale_attention(x)

    def _scale_attention(self, x):
        if self.c_attn is not None:
            x = (x.unflatten(-1, (self.nh, self.head_dim)) * self.c_attn.unsqueeze(-1)).flatten(-2)
        return x if self.attn_ln is None else self.attn_ln(x)

    def depth_cache(self, incremental_state: Dict, depth: int) -> Dict:
        """The self-attention cache of a depth, which is put there when it is first asked for."""
        return incremental_state.setdefault(self._cache_prefix() + str(depth), {})

    def source_cache(self, incremental_state: Dict, depth: int) -> Dict:
        """The state that has the keys and values of the source at a depth: the given one where all depths have the same."""
        if not self.lora_rank:
            return incremental_state
        return incremental_state.setdefault(self._cache_prefix(self.encoder_attn) + str(depth), {})

    def _cache_prefix(self, attention=None) -> str:
        return (attention or self.self_attn)._get_full_incremental_state_key("depth.")

    def reorder_incremental_state(self, incremental_state: Dict, new_order: Tensor):
        """Reorder the caches of all depths that this layer serves."""
        for attention in filter(None, (self.self_attn, self.encoder_attn)):
            prefix = self._cache_prefix(attention)
            for key, cache in incremental_state.items():
                if key.startswith(prefix):
                    attention.reorder_incremental_state(cache, new_order)

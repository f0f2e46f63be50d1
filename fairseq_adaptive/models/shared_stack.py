"""fairseq's Transformer encoder and decoder over a stack with shared layers."""

import contextlib
import copy
import functools
from typing import Dict, Optional

import torch
from fairseq.distributed import fsdp_wrap
from fairseq.models.transformer import TransformerDecoderBase, TransformerEncoderBase
from fairseq.modules import LearnedPositionalEmbedding, SinusoidalPositionalEmbedding
from torch.utils.checkpoint import checkpoint

from fairseq_adaptive.decoding.decoder_step import DecoderStep
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.models.cutoffs import check_cutoffs
from fairseq_adaptive.models.cutoffs import log_probs as adaptive_log_probs
from fairseq_adaptive.models.widths import check_tied
from fairseq_adaptive.modules import AdminResidual, DecoderLayer, DecoderStack, EncoderLayer, LayerStack, layer_schedule
from fairseq_adaptive.modules.layers.dropout import quicken_dropout
from fairseq_adaptive.modules.layers.known import change, known, same, say_once
from fairseq_adaptive.modules.layers.prepacked_linear import PrepackedLinear
from fairseq_adaptive.modules.policies import Place

_POSITIONS = (SinusoidalPositionalEmbedding, LearnedPositionalEmbedding)  # the same for all rows of a step
_SEARCH = "search"  # its place in an incremental state


def _build_stack(cfg, side, layers, sublayers, scores=None):
    half = getattr(cfg, side)
    schedule = layer_schedule(cfg.layer_sharing, half.unique_layers, half.layers)
    return (DecoderStack if side == "decoder" else LayerStack)(
        layers,
        schedule,
        layerdrop=half.layerdrop,
        residual=AdminResidual(half.layers, sublayers, half.embed_dim) if cfg.init == "admin" else None,
        pass_depth=True,
        lora_rank=cfg.depth_lora_rank,
        **cfg.layerdrop_changes,
        **half.policies.stack_arguments(Place(half.embed_dim, half.layers, scores, half.attention_heads, schedule)),
    )


def _with_unique_layers(cfg, side):
    """The configuration from which fairseq builds the M layers of one side."""
    cfg = copy.deepcopy(cfg)
    half = getattr(cfg, side)
    half.layers, half.layerdrop = half.unique_layers, 0.0
    return cfg


@same
def _recomputed(forward, offload, *args, **kwargs):
    with torch.autograd.graph.save_on_cpu() if offload else contextlib.nullcontext():
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def _wrap(layer, cfg):
    """Activation checkpointing, and FSDP around every checkpointed layer as in fairseq.

    fairseq's own checkpointing starts a backward pass in every call of a layer. DistributedDataParallel takes each for
    the only one and fails at the second depth that a layer serves; torch's non-reentrant variant has a single pass.
    """
    if cfg.checkpoint_activations:
        layer.forward = functools.partial(_recomputed, layer.forward, cfg.offload_activations)
    return fsdp_wrap(layer, min_num_params=0 if cfg.checkpoint_activations else cfg.min_params_to_wrap)


@known
class SharedTransformerEncoder(TransformerEncoderBase):
    """fairseq's encoder with M unique layers at N depths.

    Args:
        cfg: from :func:`sharing_config`
        dictionary: source dictionary
        embed_tokens: source embedding
    """

    def __init__(self, cfg, dictionary, embed_tokens):
        super().__init__(_with_unique_layers(cfg, "encoder"), dictionary, embed_tokens)
        self.cfg = cfg
        self.encoder_layerdrop = cfg.encoder.layerdrop
        self.layers = _build_stack(cfg, "encoder", self.layers, sublayers=2)
        half = cfg.encoder
        self.reader = half.policies.build("reader", Place(half.embed_dim, half.layers, heads=half.attention_heads))
        self.layers.check_reader(self.reader)
        quicken_dropout(self)
        PrepackedLinear.adopt(self)
        self.num_layers = len(self.layers)

    def build_encoder_layer(self, cfg):
        return _wrap(EncoderLayer(cfg), cfg)

    def forward_scriptable(self, src_tokens, src_lengths=None, return_all_hiddens=False, token_embeddings=None):
        """
        Returns:
            fairseq's dictionary; with a reader ``encoder_out`` is (T + S) x B x C and ``encoder_padding_mask`` B x (T +
            S), and ``read`` what was read
        """
        padding_mask = src_tokens.eq(self.padding_idx)
        x, embedding = self.forward_embedding(src_tokens, token_embeddings)
        given = padding_mask if padding_mask.any() else None
        if given is not None:
            x = x * (~padding_mask).unsqueeze(-1).to(x)
        x, read = x.transpose(0, 1), None
        states = [x] if return_all_hiddens else None
        between = None if self.layers.adaptive else states  # with policies all depths are one step
        if self.reader is None:
            x = self.layers(x, given, states=between)
        else:
            x, padding_mask, read = self.layers(x, given, reader=self.reader, states=between)
        if states is not None and between is None:
            states.append(x)
        return {
            "encoder_out": [x if self.layer_norm is None else self.layer_norm(x)],
            "encoder_padding_mask": [padding_mask],
            "encoder_embedding": [embedding],
            "encoder_states": states or [],
            "fc_results": [None] * (len(states) - 1) if states else [],
            "src_tokens": [],
            "src_lengths": [src_tokens.ne(self.padding_idx).sum(1, keepdim=True, dtype=torch.int32)],
            **({} if read is None else {"read": [read]}),
        }

    def make_generation_fast_(self, **kwargs):
        PrepackedLinear.adopt(self)

    def upgrade_state_dict_named(self, state_dict, name):
        self.layers.fold_state_dict(state_dict, f"{name}.layers.")
        return super().upgrade_state_dict_named(state_dict, name)


@known
class SharedTransformerDecoder(TransformerDecoderBase):
    """fairseq's decoder with M unique layers at N depths.

    Args:
        cfg: from :func:`sharing_config`
        dictionary: target dictionary
        embed_tokens: target embedding
        no_encoder_attn: without cross-attention

    Attributes:
        alignment_layer, alignment_heads: whose attention to the source comes out; None: the last depth, all heads
    """

    alignment_layer = alignment_heads = None

    def __init__(self, cfg, dictionary, embed_tokens, no_encoder_attn=False):
        check_cutoffs(cfg, len(dictionary), cfg.decoder.output_dim)
        check_tied(cfg, embed_tokens.embedding_dim)
        super().__init__(_with_unique_layers(cfg, "decoder"), dictionary, embed_tokens, no_encoder_attn)
        self.cfg = cfg
        self.decoder_layerdrop = cfg.decoder.layerdrop
        scores = self.word_scores if self.adaptive_softmax is None else None
        self.layers = _build_stack(cfg, "decoder", self.layers, 2 if no_encoder_attn else 3, scores)
        quicken_dropout(self)
        PrepackedLinear.adopt(self)
        self.num_layers = len(self.layers)

    def build_decoder_layer(self, cfg, no_encoder_attn=False):
        return _wrap(DecoderLayer(cfg, no_encoder_attn), cfg)

    def extract_features(
        self,
        prev_output_tokens,
        encoder_out=None,
        incremental_state=None,
        full_context_alignment=False,
        alignment_layer=None,
        alignment_heads=None,
    ):
        """As fairseq's, B x T to B x T x C and a dictionary; a language model needs no ``encoder_out``."""
        return self.extract_features_scriptable(
            prev_output_tokens, encoder_out, incremental_state, full_context_alignment, alignment_layer, alignment_heads
        )

    def word_scores(self, states):
        """Logits ... x V of the words, should the states ... x C be those after the last layer."""
        return self.output_layer(self._leave(states))

    def features_of(self, states):
        """B x T x C, what words are scored by, should the states T x B x C after some depth be those after the last."""
        return self._leave(states.transpose(0, 1))

    def begin_search(self, beam: int) -> Optional[Dict]:
        """Return the incremental state of a fast beam search, or None where these layers are not made for one.

        The first step takes one row for every sentence, later ones ``beam`` rows.
        """
        why = change(self) or (self.embed_positions and change(self.embed_positions, _POSITIONS))
        if why is not None:
            say_once("beam search", why)
        return {_SEARCH: DecoderStep(self.layers, beam)} if why is None and DecoderStep.fits(self.layers) else None

    def extract_features_scriptable(
        self,
        prev_output_tokens,
        encoder_out,
        incremental_state=None,
        full_context_alignment=False,
        alignment_layer=None,
        alignment_heads=None,
    ):
        """As fairseq's; with policies the attention weights are those of the last depth of each token, up to
        ``alignment_layer``. Where a call names no layer or heads, as in generation, it is those of the decoder."""
        alignment_layer = self.alignment_layer if alignment_layer is None else alignment_layer
        alignment_heads = self.alignment_heads if alignment_heads is None else alignment_heads
        step = (incremental_state or {}).get(_SEARCH)
        if step is not None:
            return self._search_features(prev_output_tokens, encoder_out, step)
        adaptive = self.layers.adaptive
        source = mask = None
        if encoder_out is not None:
            source, mask = (next(iter(encoder_out[name]), None) for name in ("encoder_out", "encoder_padding_mask"))
        positions = None
        if self.embed_positions is not None:
            positions = self.embed_positions(prev_output_tokens, incremental_state=incremental_state)
        if incremental_state is not None:
            prev_output_tokens = prev_output_tokens[:, -1:]
            positions = None if positions is None else positions[:, -1:]
        x = self._embed(prev_output_tokens.contiguous(), positions).transpose(0, 1)  # T x B x C
        padding = prev_output_tokens.eq(self.padding_idx)
        future = self.buffered_future_mask(x) if incremental_state is None and not full_context_alignment else None
        states = [x]
        x, attention = self.layers(
            x,
            source,
            mask,
            incremental_state,
            self_attn_mask=future,
            self_attn_padding_mask=padding if self.cross_self_attention or padding.any() else None,
            weights_at=len(self.layers) - 1 if alignment_layer is None else alignment_layer,
            states=None if adaptive else states,
        )
        if adaptive:
            states.append(x)
        if attention is not None:
            attention = attention.float().to(x)[:alignment_heads].mean(0)
        return self._leave(x.transpose(0, 1)), {"attn": [attention], "inner_states": states}

    def get_normalized_probs(self, net_output, log_probs, sample=None):
        """As fairseq's, ... x V; those of an adaptive softmax have a gradient."""
        if self.adaptive_softmax is None or not torch.is_grad_enabled():
            return super().get_normalized_probs(net_output, log_probs, sample)
        found = adaptive_log_probs(self.adaptive_softmax, net_output[0])
        return found if log_probs else found.exp()

    def _embed(self, tokens, positions):
        """... to ... x C, before the first layer."""
        x = self.embed_scale * self.embed_tokens(tokens)
        if self.quant_noise is not None:
            x = self.quant_noise(x)
        if self.project_in_dim is not None:
            x = self.project_in_dim(x)
        if positions is not None:
            x = x + positions
        if self.layernorm_embedding is not None:
            x = self.layernorm_embedding(x)
        return self.dropout_module(x)

    def _leave(self, x):
        """... x C, from the states after the last layer to what words are scored by."""
        x = x if self.layer_norm is None else self.layer_norm(x)
        return x if self.project_out_dim is None else self.project_out_dim(x)

    def _search_features(self, tokens, encoder_out, step):
        """One step of a search, tokens R x T -> R x 1 x C: fairseq's method without what only longer targets need."""
        newest, positions = tokens[:, -1], None
        if self.embed_positions is not None:
            positions = self.embed_positions(tokens[:1], incremental_state={})[0]
        padding = newest.eq(self.padding_idx)
        source = mask = None
        if encoder_out is not None:
            source, mask = encoder_out["encoder_out"][0], next(iter(encoder_out["encoder_padding_mask"]), None)
        x = step(self._embed(newest, positions), source, mask, padding if padding.any() else None)
        return self._leave(x).unsqueeze(1), {"attn": [None], "inner_states": []}

    def reorder_incremental_state_scripting(self, incremental_state, new_order):
        if _SEARCH in incremental_state:
            incremental_state[_SEARCH].reorder(new_order)
        else:
            super().reorder_incremental_state_scripting(incremental_state, new_order)

    def make_generation_fast_(self, **kwargs):
        PrepackedLinear.adopt(self)

    def upgrade_state_dict_named(self, state_dict, name):
        self.layers.fold_state_dict(state_dict, f"{name}.layers.")
        invented = f"{name}.output_projection.weight"  # by fairseq, where embeddings are shared
        there = invented in state_dict
        if self.adaptive_softmax is not None and f"{name}.adaptive_softmax.version" not in state_dict:
            raise UsageError(
                "the checkpoint is of another architecture: it has no adaptive softmax, leave out --adaptive-softmax-cutoff"
            )
        state_dict = super().upgrade_state_dict_named(state_dict, name)
        if self.output_projection is None and not there:
            state_dict.pop(invented, None)
        return state_dict

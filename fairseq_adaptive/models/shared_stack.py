"""fairseq's Transformer encoder and decoder over a stack with shared layers."""

import contextlib
import copy
import functools
from typing import Dict, Optional

import torch
from fairseq.distributed import fsdp_wrap
from fairseq.models.transformer import TransformerConfig, TransformerDecoderBase, TransformerEncoderBase
from torch.utils.checkpoint import checkpoint

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules import (
    STRATEGIES,
    AdminResidual,
    DecoderLayer,
    DecoderStack,
    EncoderLayer,
    LayerStack,
    layer_schedule,
)
from fairseq_adaptive.modules.decoder_step import DecoderStep
from fairseq_adaptive.modules.dropout import quicken_dropout
from fairseq_adaptive.modules.halting_rules import RULES, build_halting
from fairseq_adaptive.modules.packed_linear import PackedLinear
from fairseq_adaptive.ranges import LAYERS, POSITIVE_SHARE

INITIALISATIONS = ("default", "admin")
_SEARCH = "search"  # its place in an incremental state
HALTING_HELP = {
    "halting": "when a token stops: act (Simoulin and Crabbe, 2021), ut_act (Dehghani et al., 2019), pondernet (Banino "
    "et al., 2021); train with --criterion ponder_loss. Exits by confidence (Schuster et al., 2022) for inference with "
    "a model trained without halting: saturation of the state, or margin between the two best words (default: none)",
    "halting_threshold": "sum of halting probabilities at which a token stops, above 0 and at most 1 (default: 0.99, "
    "with pondernet 0.5)",
}


def add_sharing_args(parser, sides):
    """Add the flags of layer sharing for ``encoder``, ``decoder`` or both to a model's parser."""
    parser.add_argument(
        "--layer-sharing",
        choices=STRATEGIES,
        help="which unique layer serves which depth (Takase and Kiyono, 2021)",
    )
    for side in sides:
        parser.add_argument(
            f"--{side}-unique-layers",
            type=LAYERS,
            metavar="M",
            help=f"how many {side} layers have parameters of their own; they serve --{side}-layers depths "
            "(default: half of them)",
        )
    parser.add_argument(
        "--init",
        choices=INITIALISATIONS,
        help="admin: scale the residual branches of a deep post-LN model by a profile of the first training step "
        "(Liu et al., 2020)",
    )


def add_halting_args(parser, sides=()):
    """Add the flags of adaptive depth to a model's parser, and where there are several ``sides`` one for each."""
    parser.add_argument("--halting", choices=RULES, help=HALTING_HELP["halting"])
    for side in sides:
        parser.add_argument(f"--{side}-halting", choices=RULES, help=f"in the {side} (default: --halting)")
    parser.add_argument("--halting-threshold", type=POSITIVE_SHARE, metavar="H", help=HALTING_HELP["halting_threshold"])


def sharing_architecture(args, sides):
    """Fill in the defaults of layer sharing; the numbers of depths must be set."""
    args.layer_sharing = getattr(args, "layer_sharing", None) or "cycle_rev"
    args.init = getattr(args, "init", None) or "default"
    args.halting = getattr(args, "halting", None) or "none"
    args.halting_threshold = getattr(args, "halting_threshold", None)
    for side in sides:
        unique = getattr(args, f"{side}_unique_layers", None)
        if unique is None:
            unique = -(-getattr(args, f"{side}_layers") // 2)
        setattr(args, f"{side}_unique_layers", unique)


def sharing_config(args, sides) -> TransformerConfig:
    """Return fairseq's configuration of a Transformer with that of layer sharing added.

    Args:
        args: namespace or DictConfig with the flags of the model
        sides: ``encoder``, ``decoder`` or both

    Raises:
        UsageError: when options contradict each other
    """
    cfg = TransformerConfig.from_namespace(args)
    cfg.layer_sharing = str(args.layer_sharing)
    cfg.init = str(args.init)
    if cfg.init not in INITIALISATIONS:
        raise UsageError(f"unknown --init {cfg.init!r}: choose one of {', '.join(INITIALISATIONS)}")
    cfg.halting_threshold = getattr(args, "halting_threshold", None)
    for side in sides:
        getattr(cfg, side).halting = str(getattr(args, f"{side}_halting", None) or args.halting)
    if cfg.cross_self_attention and any(getattr(cfg, side).halting != "none" for side in sides):
        raise UsageError("--halting cannot be combined with --cross-self-attention: leave one of them out")
    if getattr(cfg, "base_layers", 0):
        raise UsageError("--base-layers cannot be combined with shared layers: leave it out")
    if cfg.offload_activations:
        cfg.checkpoint_activations = True
    for side in sides:
        half = getattr(cfg, side)
        if half.embed_dim % half.attention_heads:
            raise UsageError(f"--{side}-embed-dim {half.embed_dim} cannot be divided among {half.attention_heads} heads: "
                             f"choose another --{side}-attention-heads")
        half.unique_layers = getattr(args, f"{side}_unique_layers")
        layer_schedule(cfg.layer_sharing, half.unique_layers, half.layers)
        if half.halting != "none" and half.layerdrop:
            raise UsageError(f"--halting decides how many layers run: leave out --{side}-layerdrop")
        if half.layers_to_keep:
            raise UsageError(f"--{side}-layers-to-keep removes layers one by one, but here a layer serves several depths")
        if cfg.init == "admin" and half.normalize_before:
            raise UsageError(f"--init admin is for post-LN models: leave out --{side}-normalize-before")
    return cfg


def _build_stack(cfg, side, layers, sublayers, scores=None):
    half = getattr(cfg, side)
    return (DecoderStack if side == "decoder" else LayerStack)(
        layers,
        layer_schedule(cfg.layer_sharing, half.unique_layers, half.layers),
        layerdrop=half.layerdrop,
        residual=AdminResidual(half.layers, sublayers, half.embed_dim) if cfg.init == "admin" else None,
        pass_depth=True,
        halting=build_halting(half.halting, half.embed_dim, cfg.halting_threshold, scores),
    )


def _with_unique_layers(cfg, side):
    """The configuration from which fairseq builds the M layers of one side."""
    cfg = copy.deepcopy(cfg)
    half = getattr(cfg, side)
    half.layers, half.layerdrop = half.unique_layers, 0.0
    return cfg


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
        quicken_dropout(self)
        self.num_layers = len(self.layers)

    def build_encoder_layer(self, cfg):
        return _wrap(EncoderLayer(cfg), cfg)

    def make_generation_fast_(self, **kwargs):
        PackedLinear.adopt(self)

    def upgrade_state_dict_named(self, state_dict, name):
        self.layers.fold_state_dict(state_dict, f"{name}.layers.")
        return super().upgrade_state_dict_named(state_dict, name)


class SharedTransformerDecoder(TransformerDecoderBase):
    """fairseq's decoder with M unique layers at N depths.

    Args:
        cfg: from :func:`sharing_config`
        dictionary: target dictionary
        embed_tokens: target embedding
        no_encoder_attn: without cross-attention
    """

    def __init__(self, cfg, dictionary, embed_tokens, no_encoder_attn=False):
        super().__init__(_with_unique_layers(cfg, "decoder"), dictionary, embed_tokens, no_encoder_attn)
        self.cfg = cfg
        self.decoder_layerdrop = cfg.decoder.layerdrop
        scores = self.word_scores if self.adaptive_softmax is None else None
        self.layers = _build_stack(cfg, "decoder", self.layers, 2 if no_encoder_attn else 3, scores)
        quicken_dropout(self)
        self.num_layers = len(self.layers)

    def build_decoder_layer(self, cfg, no_encoder_attn=False):
        return _wrap(DecoderLayer(cfg, no_encoder_attn), cfg)

    def word_scores(self, states):
        """Logits ... x V of the words, should the states ... x C be those after the last layer."""
        states = states if self.layer_norm is None else self.layer_norm(states)
        return self.output_layer(states if self.project_out_dim is None else self.project_out_dim(states))

    def begin_search(self, beam: int) -> Optional[Dict]:
        """Return the incremental state of a fast beam search, or None where these layers are not made for one.

        The first step takes one row for every sentence, later ones ``beam`` rows. No attention weights are returned.
        """
        plain = all(isinstance(self.layers[depth], DecoderLayer) for depth in range(len(self.layers)))
        return {_SEARCH: DecoderStep(self.layers, beam)} if plain and DecoderStep.fits(self.layers) else None

    def extract_features(self, *args, alignment_layer=None, **kwargs):
        step = (kwargs.get("incremental_state") or {}).get(_SEARCH)
        if step is not None:
            return self._search_features(args[0], kwargs.get("encoder_out"), step)
        if self.layers.halting is not None and alignment_layer is None and not self.training:
            # with halting all depths are one step of the stack; make_generation_fast_ says who wants the weights
            alignment_layer = 0 if getattr(self.layers[0], "need_attn", False) else None
        return super().extract_features(*args, alignment_layer=alignment_layer, **kwargs)

    def _search_features(self, tokens, encoder_out, step):
        """One step of a search, tokens R x T -> R x 1 x C: fairseq's method without what only longer targets need."""
        newest = tokens[:, -1]
        x = self.embed_scale * self.embed_tokens(newest)
        if self.quant_noise is not None:
            x = self.quant_noise(x)
        if self.project_in_dim is not None:
            x = self.project_in_dim(x)
        if self.embed_positions is not None:
            x = x + self.embed_positions(tokens[:1], incremental_state={})[0]
        if self.layernorm_embedding is not None:
            x = self.layernorm_embedding(x)
        padding = newest.eq(self.padding_idx)
        source = mask = None
        if encoder_out is not None:
            source, mask = encoder_out["encoder_out"][0], next(iter(encoder_out["encoder_padding_mask"]), None)
        x = step(self.dropout_module(x), source, mask, padding if padding.any() else None)
        if self.layer_norm is not None:
            x = self.layer_norm(x)
        if self.project_out_dim is not None:
            x = self.project_out_dim(x)
        return x.unsqueeze(1), {"attn": [None], "inner_states": []}

    def reorder_incremental_state_scripting(self, incremental_state, new_order):
        if _SEARCH in incremental_state:
            incremental_state[_SEARCH].reorder(new_order)
        else:
            super().reorder_incremental_state_scripting(incremental_state, new_order)

    def make_generation_fast_(self, **kwargs):
        PackedLinear.adopt(self)

    def upgrade_state_dict_named(self, state_dict, name):
        self.layers.fold_state_dict(state_dict, f"{name}.layers.")
        return super().upgrade_state_dict_named(state_dict, name)


class ExplainsLoading:
    """Mixin for models: weights that do not fit are refused in one sentence."""

    def load_state_dict(self, state_dict, strict=True, model_cfg=None, args=None):
        try:
            return super().load_state_dict(state_dict, strict=strict, model_cfg=model_cfg, args=args)
        except RuntimeError as error:
            first = " ".join(str(error).split()[:40])
            raise UsageError(f"the checkpoint is of another architecture: {first} ...") from error

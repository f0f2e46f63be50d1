"""Translation with parameters shared across layers: ``--arch shared_transformer`` and its presets.

Takase and Kiyono, *Lessons on Parameter Sharing across Layers in Transformers* (SustaiNLP 2023).
"""

from argparse import Namespace

from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.models import register_model_architecture
from fairseq.models.transformer import TransformerConfig, TransformerModelBase
from fairseq.models.transformer.transformer_legacy import base_architecture

from fairseq_adaptive.decoding.beam_generator import BeamGenerator
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.models.config import register_with_config
from fairseq_adaptive.models.defaults import fill_architecture, fill_defaults, flags
from fairseq_adaptive.models.fitting import ExplainsLoading
from fairseq_adaptive.models.int8 import RunsInInt8, add_int8_args, as_asked
from fairseq_adaptive.models.layerdrop_flags import add_layerdrop_args
from fairseq_adaptive.models.policy_flags import add_policy_args
from fairseq_adaptive.models.shared_stack import SharedTransformerDecoder, SharedTransformerEncoder
from fairseq_adaptive.models.sharing_flags import (
    MIXTURE_OF_RECURSIONS,
    add_sharing_args,
    sharing_architecture,
    sharing_config,
)
from fairseq_adaptive.modules.layers.known import known
from fairseq_adaptive.ranges import LAYERS, Range, check_ranges, declare_ranges

SIDES = ("encoder", "decoder")


@known
@register_with_config("shared_transformer")
class SharedTransformerModel(RunsInInt8, ExplainsLoading, TransformerModelBase):
    """fairseq's Transformer whose encoder and decoder run M unique layers at N depths.

    With as many unique layers as depths it is fairseq's Transformer, name by name and number by number.
    """

    generator_class = BeamGenerator
    outputs = ("decoder.output_projection",)

    @classmethod
    def add_args(cls, parser):
        gen_parser_from_dataclass(parser, TransformerConfig(), delete_default=True, with_prefix="")
        add_sharing_args(parser, SIDES)
        add_layerdrop_args(parser)
        add_policy_args(parser, SIDES)
        add_int8_args(parser)
        parser.add_argument(
            "--alignment-layer",
            type=Range(int, 0, LAYERS.most - 1),
            metavar="D",
            help="depth of the decoder, counted from 0, whose attention to the source is taught by --load-alignments "
            "and printed by --print-alignment (default: the last)",
        )
        parser.add_argument(
            "--alignment-heads",
            type=Range(int, 1, 1024),
            metavar="H",
            help="how many heads of it, the first ones, are averaged (default: all)",
        )
        declare_ranges(parser)

    @classmethod
    def build_model(cls, args, task):
        args = Namespace(**{name: value for name, value in flags(args).items() if value is not None})
        shared_transformer(args)
        check_ranges(args, cls)
        if args.tie_adaptive_weights and args.adaptive_softmax_cutoff:
            raise UsageError(
                "--tie-adaptive-weights ties adaptive inputs, which a translation model has not: leave it out"
            )
        aligned = [getattr(args, name, None) for name in ("alignment_layer", "alignment_heads")]
        for name, given, most in (
            ("--alignment-layer", aligned[0], args.decoder_layers - 1),
            ("--alignment-heads", aligned[1], args.decoder_attention_heads),
        ):
            if given is not None and given > most:
                raise UsageError(f"{name} {given} is impossible: the decoder has it up to {most}")
        model = super().build_model(sharing_config(args, SIDES), task)
        model.decoder.alignment_layer, model.decoder.alignment_heads = aligned
        return as_asked(model, args)

    @classmethod
    def build_encoder(cls, cfg, src_dict, embed_tokens):
        return SharedTransformerEncoder(cfg, src_dict, embed_tokens)

    @classmethod
    def build_decoder(cls, cfg, tgt_dict, embed_tokens):
        return SharedTransformerDecoder(cfg, tgt_dict, embed_tokens, no_encoder_attn=cfg.no_cross_attention)


def _both(**values):
    return {f"{side}_{name}": value for side in SIDES for name, value in values.items()}


@register_model_architecture("shared_transformer", "shared_transformer")
@register_model_architecture("shared_transformer", "shared_transformer_wmt_en_de")
def shared_transformer(args):
    """Base width (512), 6 unique layers at 12 depths."""
    fill_defaults(args, **_both(layers=12), base_layers=0)  # fairseq's trainer reads the latter
    fill_architecture(args, base_architecture)
    sharing_architecture(args, SIDES)


@register_model_architecture("shared_transformer", "shared_transformer_wmt_en_de_18")
def shared_transformer_wmt_en_de_18(args):
    """Base width, 6 unique layers at 18 depths."""
    fill_defaults(args, **_both(layers=18, unique_layers=6))
    shared_transformer(args)


@register_model_architecture("shared_transformer", "shared_transformer_wmt_en_de_big")
def shared_transformer_wmt_en_de_big(args):
    """Width 1024, 6 unique layers at 12 depths."""
    fill_defaults(args, dropout=0.3, **_both(embed_dim=1024, ffn_embed_dim=4096, attention_heads=16))
    shared_transformer(args)


@register_model_architecture("shared_transformer", "universal_transformer_wmt_en_de")
def universal_transformer_wmt_en_de(args):
    """Width 1024, one layer at 6 depths: a Universal Transformer (Dehghani et al., 2019) without halting."""
    fill_defaults(args, **_both(embed_dim=1024, ffn_embed_dim=4096, attention_heads=16, layers=6, unique_layers=1))
    shared_transformer(args)


@register_model_architecture("shared_transformer", "shared_transformer_iwslt_de_en")
def shared_transformer_iwslt_de_en(args):
    """The width of fairseq's ``transformer_iwslt_de_en``, 6 unique layers at 12 depths."""
    fill_defaults(args, **_both(embed_dim=512, ffn_embed_dim=1024, attention_heads=4))
    shared_transformer(args)


@register_model_architecture("shared_transformer", "shared_transformer_tiny")
def shared_transformer_tiny(args):
    """Width 128, 3 unique layers at 6 depths: for Multi30k and for tests."""
    fill_defaults(args, **_both(embed_dim=128, ffn_embed_dim=256, attention_heads=4, layers=6, unique_layers=3))
    shared_transformer(args)


@register_model_architecture("shared_transformer", "layerskip_iwslt_de_en")
def layerskip_iwslt_de_en(args):
    """The width of ``transformer_iwslt_de_en``, 12 decoder layers to exit from and 6 encoder layers; the rates of
    LayerSkip's layer dropout (Elhoushi et al., 2024), in the decoder. Train with ``--criterion early_exit_loss``."""
    fill_defaults(
        args,
        encoder_layers=6,
        encoder_unique_layers=6,
        decoder_unique_layers=12,
        decoder_layerdrop=0.2,
        layerdrop_by_depth="exponential",
        **_both(normalize_before=True, embed_dim=512, ffn_embed_dim=1024, attention_heads=4),
    )
    shared_transformer(args)


@register_model_architecture("shared_transformer", "layerskip_tiny")
def layerskip_tiny(args):
    """As ``layerskip_iwslt_de_en``, of width 128: for Multi30k and for tests."""
    fill_defaults(args, **_both(embed_dim=128, ffn_embed_dim=256))
    layerskip_iwslt_de_en(args)


@register_model_architecture("shared_transformer", "mixture_of_recursions_iwslt_de_en")
def mixture_of_recursions_iwslt_de_en(args):
    """The width of ``transformer_iwslt_de_en``; encoder and decoder have 3 recursions of 2 layers between a first and a
    last of their own, 8 depths, and tokens choose among them (Bae et al., 2025, expert choice)."""
    sizes = _both(
        embed_dim=512, ffn_embed_dim=1024, attention_heads=4, layers=8, unique_layers=4, normalize_before=True
    )
    fill_defaults(args, **sizes, **MIXTURE_OF_RECURSIONS)
    shared_transformer(args)


@register_model_architecture("shared_transformer", "mixture_of_recursions_tiny")
def mixture_of_recursions_tiny(args):
    """As ``mixture_of_recursions_iwslt_de_en``, of width 128: for Multi30k and for tests."""
    fill_defaults(args, **_both(embed_dim=128, ffn_embed_dim=256))
    mixture_of_recursions_iwslt_de_en(args)

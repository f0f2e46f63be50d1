"""Language models with parameters shared across layers: ``--arch shared_transformer_lm``."""

import copy
from dataclasses import dataclass, field
from typing import Optional

from fairseq.dataclass import ChoiceEnum
from fairseq.models import register_model, register_model_architecture
from fairseq.models.transformer_lm import TransformerLanguageModel, TransformerLanguageModelConfig, base_lm_architecture

from fairseq_adaptive.decoding.beam_generator import BeamGenerator
from fairseq_adaptive.models.cutoffs import check_cutoffs, check_ties
from fairseq_adaptive.models.defaults import fill_architecture, fill_defaults
from fairseq_adaptive.models.fitting import ExplainsLoading
from fairseq_adaptive.models.int8 import HELP, RunsInInt8, as_asked
from fairseq_adaptive.models.layerdrop_flags import LayerDropConfig
from fairseq_adaptive.models.policy_flags import PolicyConfig
from fairseq_adaptive.models.shared_stack import SharedTransformerDecoder
from fairseq_adaptive.models.sharing_flags import (
    DEPTH_LORA_HELP,
    INITIALISATIONS,
    MIXTURE_OF_RECURSIONS,
    sharing_architecture,
    sharing_config,
)
from fairseq_adaptive.modules import STRATEGIES
from fairseq_adaptive.modules.layers.known import known
from fairseq_adaptive.ranges import LAYERS, OPTIONAL_WIDTH, check_ranges, ranged


@dataclass
class SharedTransformerLanguageModelConfig(LayerDropConfig, PolicyConfig, TransformerLanguageModelConfig):
    layer_sharing: ChoiceEnum(STRATEGIES) = field(
        default="cycle_rev", metadata={"help": "which unique layer serves which depth (Takase and Kiyono, 2021)"}
    )
    decoder_unique_layers: Optional[int] = ranged(
        None,
        LAYERS,
        "how many layers have parameters of their own; they serve --decoder-layers depths (default: half of them)",
    )
    init: ChoiceEnum(INITIALISATIONS) = field(
        default="default",
        metadata={
            "help": "admin: scale the residual branches of a deep post-LN model by a profile of the first training "
            "step (Liu et al., 2020)"
        },
    )
    depth_lora_rank: int = ranged(0, OPTIONAL_WIDTH, DEPTH_LORA_HELP)
    int8: bool = field(default=False, metadata={"help": HELP})


@known
@register_model("shared_transformer_lm", dataclass=SharedTransformerLanguageModelConfig)
class SharedTransformerLanguageModel(RunsInInt8, ExplainsLoading, TransformerLanguageModel):
    """fairseq's ``transformer_lm`` whose decoder runs M unique layers at N depths, with adaptive input and softmax."""

    generator_class = BeamGenerator
    outputs = ("decoder.output_projection",)

    @staticmethod
    def architecture(args):
        """Fill in the flags that are not given and have no default in the dataclass."""
        sharing_architecture(args, ("decoder",))

    @classmethod
    def build_model(cls, args, task):
        cls.architecture(args)
        check_ranges(args, SharedTransformerLanguageModelConfig)
        cfg = sharing_config(args, ("decoder",))
        check_ties(args)
        check_cutoffs(args, len(task.target_dictionary), args.decoder_output_dim)
        if args.adaptive_input:
            check_cutoffs(args, len(task.source_dictionary), args.decoder_input_dim, "adaptive_input")
        # fairseq's own model, built without layers, brings the embeddings and the checks of its many options
        shell = copy.deepcopy(args)
        shell.decoder_layers = 0
        model = super().build_model(shell, task)
        embed_tokens = model.decoder.embed_tokens
        cfg.max_target_positions = shell.max_target_positions
        model = cls(SharedTransformerDecoder(cfg, task.target_dictionary, embed_tokens, no_encoder_attn=True))
        return as_asked(model, args)


@register_model_architecture("shared_transformer_lm", "shared_transformer_lm_base")
def shared_transformer_lm_base(args):
    """6 unique layers at 12 depths, pre-LN as fairseq's language models are."""
    fill_defaults(args, decoder_layers=12)
    fill_architecture(args, base_lm_architecture)
    sharing_architecture(args, ("decoder",))


# the sizes of the smallest GPT
_GPT = {
    "decoder_layers": 12,
    "decoder_unique_layers": 12,
    "decoder_embed_dim": 768,
    "decoder_ffn_embed_dim": 3072,
    "decoder_attention_heads": 12,
    "activation_fn": "gelu",
    "share_decoder_input_output_embed": True,
}


def _presets(args, **values):
    fill_defaults(args, **values)
    shared_transformer_lm_base(args)


@register_model_architecture("shared_transformer_lm", "layerskip_lm_base")
def layerskip_lm_base(args):
    """12 layers of 768 to exit from, with the rates of LayerSkip's layer dropout (Elhoushi et al., 2024). Train with
    ``--criterion early_exit_loss``."""
    _presets(args, **_GPT, decoder_layerdrop=0.2, layerdrop_by_depth="exponential")


@register_model_architecture("shared_transformer_lm", "layerskip_lm_tiny")
def layerskip_lm_tiny(args):
    """As ``layerskip_lm_base``, of width 128: for tests and first trials."""
    fill_defaults(args, decoder_embed_dim=128, decoder_ffn_embed_dim=256, decoder_attention_heads=4)
    layerskip_lm_base(args)


@register_model_architecture("shared_transformer_lm", "mixture_of_depths_lm_base")
def mixture_of_depths_lm_base(args):
    """Mixture-of-Depths (Raposo et al., 2024) as published, at the width of ``transformer_lm``'s GPT sizes: 12 layers of
    768, an eighth of the tokens at every other one."""
    _presets(
        args, **_GPT, router="mixture_of_depths", router_args='{"capacity": "12.5%", "every": 2, "weighting": "score"}'
    )


@register_model_architecture("shared_transformer_lm", "mixture_of_depths_lm_tiny")
def mixture_of_depths_lm_tiny(args):
    """6 layers of 128, half of the tokens at every other one: for tests and first trials."""
    _presets(
        args,
        decoder_layers=6,
        decoder_unique_layers=6,
        decoder_embed_dim=128,
        decoder_ffn_embed_dim=256,
        decoder_attention_heads=4,
        share_decoder_input_output_embed=True,
        router="mixture_of_depths",
        router_args='{"capacity": "50%", "every": 2, "weighting": "score"}',
    )


@register_model_architecture("shared_transformer_lm", "mixture_of_recursions_lm_360m")
def mixture_of_recursions_lm_360m(args):
    """The published expert choice at the sizes of the 360M model (32 depths of 960): 3 recursions of 10 layers between a
    first and a last of their own. Sizes of SmolLM-360M, from memory; its block, with rotary positions, grouped keys and
    SwiGLU, is not fairseq's."""
    _presets(
        args,
        decoder_layers=32,
        decoder_unique_layers=12,
        decoder_embed_dim=960,
        decoder_ffn_embed_dim=2560,
        decoder_attention_heads=15,
        activation_fn="gelu",
        share_decoder_input_output_embed=True,
        **MIXTURE_OF_RECURSIONS,
    )


@register_model_architecture("shared_transformer_lm", "mixture_of_recursions_lm_tiny")
def mixture_of_recursions_lm_tiny(args):
    """3 recursions of 2 layers between a first and a last, of width 128: for tests and first trials."""
    _presets(
        args,
        decoder_layers=8,
        decoder_unique_layers=4,
        decoder_embed_dim=128,
        decoder_ffn_embed_dim=256,
        decoder_attention_heads=4,
        share_decoder_input_output_embed=True,
        **MIXTURE_OF_RECURSIONS,
    )


@register_model_architecture("shared_transformer_lm", "shared_transformer_lm_wikitext103")
def shared_transformer_lm_wikitext103(args):
    """The 121M parameter model of Takase and Kiyono (2021), Table 6: 6 unique layers at 12 depths, adaptive inputs."""
    _presets(
        args,
        **{
            "decoder_layers": 12,
            "decoder_unique_layers": 6,
            "decoder_attention_heads": 8,
            "decoder_embed_dim": 1024,
            "decoder_ffn_embed_dim": 4096,
            "dropout": 0.3,
            "attention_dropout": 0.1,
            "activation_dropout": 0.1,
            "adaptive_input": True,
            "tie_adaptive_weights": True,
            "tie_adaptive_proj": True,
            "adaptive_input_cutoff": "20000,60000",
            "adaptive_softmax_cutoff": "20000,60000",
            "adaptive_softmax_dropout": 0.2,
            "no_decoder_final_norm": True,
        },
    )

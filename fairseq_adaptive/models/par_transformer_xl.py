"""Language models of attention and feed-forward blocks in any order: ``--arch par_transformer_xl``.

``af`` repeated is Transformer-XL (Dai et al., 2019); attention only where the search wants it is PAR Transformer-XL
(Mandava et al., *Pay Attention when Required*, 2020).
"""

import logging
from dataclasses import dataclass, field
from typing import Optional

from fairseq.dataclass import ChoiceEnum
from fairseq.models import FairseqLanguageModel, register_model, register_model_architecture

from fairseq_adaptive.models.defaults import fill_defaults, with_defaults
from fairseq_adaptive.models.fitting import ExplainsLoading
from fairseq_adaptive.models.layerdrop_flags import LayerDropConfig
from fairseq_adaptive.models.policy_flags import PolicyConfig
from fairseq_adaptive.models.segmented_decoder import SegmentedDecoder
from fairseq_adaptive.modules.stack.schedule import STRATEGIES
from fairseq_adaptive.modules.transformer_xl.layout import BLOCKS, parse_layout
from fairseq_adaptive.ranges import DISTANCE, DROPOUT, FACTOR, FFN_WIDTH, HEADS, PRICE, WIDTH, check_ranges, ranged

logger = logging.getLogger(__name__)


@dataclass
class TransformerXLConfig(PolicyConfig):
    """What the found model and the supernet have in common."""

    decoder_embed_dim: int = ranged(512, WIDTH, "width of the model")
    decoder_ffn_embed_dim: int = ranged(2048, FFN_WIDTH, "inner width of feed-forward blocks")
    decoder_attention_heads: int = ranged(8, HEADS, "number of attention heads")
    decoder_head_dim: Optional[int] = ranged(None, WIDTH, "width of an attention head (default: embed dim / heads)")
    dropout: float = ranged(0.1, DROPOUT, "dropout of embeddings, positions, blocks and the output")
    attention_dropout: float = ranged(0.0, DROPOUT, "dropout of attention probabilities")
    activation_dropout: float = ranged(0.0, DROPOUT, "dropout between the maps of feed-forward blocks")
    decoder_normalize_before: bool = field(
        default=False, metadata={"help": "LayerNorm before each block and at the end"}
    )
    memory_length: int = ranged(192, DISTANCE, "how many positions before a segment are remembered")
    clamp_length: int = ranged(0, DISTANCE, "encode larger distances as this one (0: encode every distance)")
    same_length: bool = field(
        default=False,
        metadata={"help": "each position sees exactly --memory-length keys, so that all have the same context"},
    )
    untie_relative_bias: bool = field(
        default=False, metadata={"help": "each attention block has biases u and v of its own"}
    )
    adaptive_softmax_cutoff: Optional[str] = field(
        default=None,
        metadata={"help": "comma separated list of cutoffs of the vocabulary (fairseq-adaptive cutoffs finds them)"},
    )
    adaptive_softmax_factor: float = ranged(
        1.0, FACTOR, "each cluster's embeddings are this much narrower than those before it"
    )
    adaptive_softmax_dropout: float = ranged(0.0, DROPOUT, "dropout of the adaptive softmax's tails")
    share_decoder_input_output_embed: bool = field(
        default=False, metadata={"help": "tie the embeddings of the input and the output, of every cluster"}
    )
    tie_adaptive_proj: bool = field(
        default=False, metadata={"help": "tie the projections of the input's and the output's clusters, save the first"}
    )
    init_std: float = ranged(0.02, PRICE, "standard deviation of the initial weights")


@dataclass
class PARTransformerXLConfig(LayerDropConfig, TransformerXLConfig):
    layout: str = field(
        default="afff*6,f*8",
        metadata={"help": "kind of every block: groups of a (attention) and f (feed-forward), *N repeats a group"},
    )
    layer_sharing: ChoiceEnum(STRATEGIES) = field(
        default="cycle", metadata={"help": "which unique block serves which depth (Takase and Kiyono, 2021)"}
    )
    decoder_unique_layers: Optional[int] = ranged(
        None, BLOCKS, "how many blocks have parameters of their own (default: all of the layout)"
    )
    halting_after: ChoiceEnum(("any", "a", "f")) = field(
        default="any",
        metadata={
            "help": "after which blocks --halting is asked, and after the last: with f, for instance, it counts the layers "
            "of af*8 and not their blocks (default: any)"
        },
    )
    decoder_layerdrop: float = ranged(0.0, DROPOUT, "probability with which a block is left out in a training step")


class SegmentedLanguageModel(ExplainsLoading, FairseqLanguageModel):
    """A language model that reads a text segment by segment and remembers what was before."""

    @staticmethod
    def warn_of_forgetting(cfg, task):
        """Say it where a task gives no memory to the model."""
        if cfg.memory_length and not getattr(task, "takes_memory", False):
            logger.warning(
                "--memory-length %d is not used: this task begins every segment without a memory of the one before. "
                "Train and evaluate with --task segmented_language_modeling, or give --memory-length 0",
                cfg.memory_length,
            )

    def max_positions(self):
        return self.decoder.max_positions()


@register_model("par_transformer_xl", dataclass=PARTransformerXLConfig)
class PARTransformerXLModel(SegmentedLanguageModel):
    """Transformer-XL with the layout of its blocks given by ``--layout``."""

    @classmethod
    def build_model(cls, cfg, task):
        cfg = with_defaults(cfg, PARTransformerXLConfig)
        check_ranges(cfg, cls)
        cls.warn_of_forgetting(cfg, task)
        return cls(SegmentedDecoder(cfg, task.target_dictionary, parse_layout(cfg.layout)))


def _preset(name, **values):
    """Register an architecture: what the user does not set has these values."""

    def architecture(args):
        fill_defaults(args, **values)

    architecture.__doc__ = ", ".join(f"{key} {value}" for key, value in values.items())
    register_model_architecture("par_transformer_xl", name)(architecture)


# cutoffs 20000, 40000 and 200000 of the original's dictionary, moved by fairseq's four special symbols
_WIKITEXT103 = {
    "adaptive_softmax_cutoff": "20004,40004,200004",
    "share_decoder_input_output_embed": True,
    "tie_adaptive_proj": True,
}
_LARGE = {
    "decoder_embed_dim": 1024,
    "decoder_ffn_embed_dim": 4096,
    "decoder_attention_heads": 16,
    "dropout": 0.2,
    "attention_dropout": 0.2,
    "activation_dropout": 0.2,
    "memory_length": 384,
    "untie_relative_bias": True,
    "adaptive_softmax_factor": 4.0,
    **_WIKITEXT103,
}
_CHARACTERS = {"memory_length": 512, "dropout": 0.1, "activation_dropout": 0.1}

# Mandava et al. (2020), Section 4: blocks that their searches found, in NVIDIA's Transformer-XL base and large
_preset("par_transformer_xl_base", layout="afff*6,f*8", activation_dropout=0.1, **_WIKITEXT103)
_preset("par_transformer_xl_large", layout="aff*7,f*15", **_LARGE)
_preset("par_transformer_xl_enwik8", layout="affff*4,f*4", **_CHARACTERS)
# Dai et al. (2019): run_wt103_base.sh, run_wt103_large.sh and run_enwik8_base.sh of the authors' code
_preset(
    "transformer_xl_wt103_base",
    layout="af*16",
    decoder_embed_dim=410,
    decoder_attention_heads=10,
    decoder_ffn_embed_dim=2100,
    activation_dropout=0.1,
    memory_length=150,
    **_WIKITEXT103,
)
_preset("transformer_xl_wt103_large", layout="af*18", **_LARGE)
_preset("transformer_xl_enwik8", layout="af*12", **_CHARACTERS)
# Press et al., Improving Transformer Models by Reordering their Sublayers (2020): 6 of 16 layers are sandwiched
_preset("par_transformer_xl_sandwich", layout="a*6,af*10,f*6", activation_dropout=0.1, **_WIKITEXT103)

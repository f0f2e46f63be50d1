"""ALBERT-ACT, one layer applied as often as each token needs: ``--arch albert_act_base`` and its presets.

Simoulin and Crabbe, *How Many Layers and Why? An Analysis of the Model Depth in Transformers* (ACL-SRW 2021).
"""

import torch
from fairseq.models import FairseqEncoder, register_model_architecture
from fairseq.models.transformer import TransformerConfig
from fairseq.utils import get_activation_fn, get_available_activation_fns
from torch import nn
from torch.nn import functional as F

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.models.config import register_with_config
from fairseq_adaptive.models.defaults import fill_defaults
from fairseq_adaptive.models.inner_states import inner_states, of_all_depths
from fairseq_adaptive.models.int8 import add_int8_args
from fairseq_adaptive.models.policy_flags import Policies, add_policy_args, check_used
from fairseq_adaptive.models.roberta_family import RobertaFamily, check_heads, check_length
from fairseq_adaptive.models.sharing_flags import add_depth_lora_arg, check_depth_lora
from fairseq_adaptive.modules import EncoderLayer, LayerStack
from fairseq_adaptive.modules.layers.zero_gradients import zero_gradients
from fairseq_adaptive.modules.policies import Place
from fairseq_adaptive.ranges import DROPOUT, FFN_WIDTH, HEADS, LAYERS, POSITIONS, WIDTH, declare_ranges

LAYER_NORM_EPS = 1e-12  # of ALBERT

INTEGERS = {
    "encoder-layers": ("N", "how often the layer is applied at most"),
    "encoder-input-dim": ("E", "width of the embeddings, which are projected to that of the layer"),
    "encoder-embed-dim": ("C", "width of the layer"),
    "encoder-ffn-embed-dim": ("F", "inner width of its feed-forward block"),
    "encoder-attention-heads": ("A", "number of its attention heads"),
    "max-positions": ("T", "longest sequence (default: --tokens-per-sample)"),
}
INTEGER_RANGES = {
    "encoder-layers": LAYERS,
    "encoder-attention-heads": HEADS,
    "max-positions": POSITIONS,
    "encoder-ffn-embed-dim": FFN_WIDTH,
}
PROBABILITIES = {
    "dropout": "dropout probability",
    "attention-dropout": "dropout probability of attention weights",
    "activation-dropout": "dropout probability within the feed-forward block",
    "pooler-dropout": "dropout probability in classification heads",
}


class MaskedLMHead(nn.Module):
    """Scores of all words, through the width of the embeddings, whose matrix is the output projection.

    Args:
        embed_dim: C
        weight: V x E, the embedding matrix
        activation_fn: name of the activation
    """

    def __init__(self, embed_dim: int, weight: nn.Parameter, activation_fn: str):
        super().__init__()
        self.dense = nn.Linear(embed_dim, weight.size(1))
        self.activation_fn = get_activation_fn(activation_fn)
        self.layer_norm = nn.LayerNorm(weight.size(1), eps=LAYER_NORM_EPS)
        self.weight = weight
        self.bias = nn.Parameter(torch.zeros(weight.size(0)))

    def forward(self, features, masked_tokens=None):
        """B x T x C to B x T x V, or with ``masked_tokens`` (B x T, boolean) to M x V, the scores where it is true."""
        if masked_tokens is not None:
            features = features[masked_tokens]
        features = self.layer_norm(self.activation_fn(self.dense(features)))
        return F.linear(features, self.weight, self.bias)


class AlbertActEncoder(FairseqEncoder):
    """Factorised embeddings, one layer run under a halting rule, and the heads of pretraining.

    Args:
        args: flags of the model
        dictionary: of the source

    Raises:
        UsageError: when flags contradict each other
    """

    def __init__(self, args, dictionary):
        super().__init__(dictionary)
        if args.encoder_layers < 1:
            raise UsageError(f"--encoder-layers {args.encoder_layers} is impossible: a model has at least 1 layer")
        check_heads(args)
        self.max_source_positions, self.padding_idx = args.max_positions, dictionary.pad()
        width = args.encoder_input_dim
        self.embed_tokens = nn.Embedding(len(dictionary), width, self.padding_idx)
        self.embed_positions = nn.Embedding(args.max_positions, width)
        self.embed_segments = nn.Embedding(2, width)
        self.layernorm_embedding = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.dropout_module = nn.Dropout(args.dropout)
        self.project_in_dim = nn.Linear(width, args.encoder_embed_dim)
        layer = EncoderLayer(TransformerConfig.from_namespace(args))
        layer.self_attn_layer_norm.eps = layer.final_layer_norm.eps = LAYER_NORM_EPS
        self.policies = policies = Policies(args, "encoder")
        check_used(args, policies)
        schedule = (0,) * args.encoder_layers
        place = Place(
            args.encoder_embed_dim, args.encoder_layers, self.word_scores, args.encoder_attention_heads, schedule
        )
        rank = check_depth_lora(args)
        self.layers = LayerStack([layer], schedule, pass_depth=True, lora_rank=rank, **policies.stack_arguments(place))
        self.reader = policies.build("reader", place)
        self.layers.check_reader(self.reader)
        self.pooler = nn.Linear(args.encoder_embed_dim, args.encoder_embed_dim)
        self.lm_head = MaskedLMHead(args.encoder_embed_dim, self.embed_tokens.weight, args.activation_fn)
        self.sentence_order_head = nn.Linear(args.encoder_embed_dim, 2)

    def word_scores(self, states):
        """... x C to ... x V."""
        return self.lm_head(states)

    def forward(
        self,
        src_tokens,
        features_only=False,
        return_all_hiddens=False,
        masked_tokens=None,
        segments=None,
        padding_mask=None,
        **unused,
    ):
        """
        Args:
            src_tokens: B x T, padded on the right
            features_only: leave out the word scores
            masked_tokens: B x T, score words only where it is true
            segments: B x T, 0 in the first part of the text and 1 in the second (default: 0)
            padding_mask: B x T, true at padding (default: where ``src_tokens`` are padding)

        Returns:
            word scores B x T x V (M x V with ``masked_tokens``) or states B x T x C, and a dict with ``pooled``, B x C.
            Where ``layers.every_depth`` is set and PonderNet trains, N B takes the place of B

        Raises:
            UsageError: for sequences longer than ``--max-positions``
        """
        features, extra = self.extract_features(src_tokens, return_all_hiddens, segments, padding_mask)
        extra["pooled"] = torch.tanh(self.pooler(features[:, 0]))
        heads = (self.pooler, self.sentence_order_head)  # of which tasks use some
        if features_only:
            return zero_gradients(features, *heads, self.lm_head), extra
        features = zero_gradients(features, *heads)
        return self.lm_head(features, of_all_depths(masked_tokens, features)), extra

    def extract_features(
        self, src_tokens, return_all_hiddens=False, segments=None, padding_mask=None, token_embeddings=None, **unused
    ):
        """As RoBERTa's: B x T to B x T x C, and a dict with ``inner_states``, with ``return_all_hiddens`` a list of N + 1
        states T x B x C, before the first application and after each; further arguments are those of :meth:`forward`,
        and ``token_embeddings``, B x T x E, takes the place of those of ``src_tokens``."""
        check_length(src_tokens, self.max_source_positions)
        length = src_tokens.size(1)
        if padding_mask is None:
            padding_mask = src_tokens.eq(self.padding_idx)
        segments = torch.zeros_like(src_tokens) if segments is None else segments
        x = self.embed_tokens(src_tokens) if token_embeddings is None else token_embeddings
        x = x + self.embed_segments(segments) + self.embed_positions.weight[:length]
        x = self.project_in_dim(self.dropout_module(self.layernorm_embedding(x)))
        start = x = x.transpose(0, 1)  # T x B x C
        between = [] if return_all_hiddens else None
        padding_mask = padding_mask if padding_mask.any() else None
        protected = None
        if self.layers.router is not None:  # the pooler reads the first
            protected = torch.zeros_like(src_tokens, dtype=torch.bool)
            protected[:, 0] = True
        x = self.layers(x, padding_mask, protected, reader=self.reader, states=between)
        x = x if self.reader is None else x[0][:length]
        return x.transpose(0, 1), {"inner_states": inner_states(self.layers, start, between, x, length)}

    def max_positions(self):
        return self.max_source_positions


@register_with_config("albert_act")
class AlbertActModel(RobertaFamily):
    """ALBERT-ACT with RoBERTa's interface: stock ``masked_lm`` and ``sentence_prediction`` train it."""

    encoder_class = AlbertActEncoder

    @staticmethod
    def add_args(parser):
        for name, (metavar, text) in INTEGERS.items():
            parser.add_argument(f"--{name}", type=INTEGER_RANGES.get(name, WIDTH), metavar=metavar, help=text)
        for name, text in PROBABILITIES.items():
            parser.add_argument(f"--{name}", type=DROPOUT, metavar="D", help=text)
        activations = get_available_activation_fns()
        parser.add_argument("--activation-fn", choices=activations, help="activation of the feed-forward block")
        parser.add_argument("--pooler-activation-fn", choices=activations, help="activation in classification heads")
        parser.add_argument(
            "--load-checkpoint-heads", action="store_true", help="keep the classification heads of a checkpoint"
        )
        add_depth_lora_arg(parser)
        add_policy_args(parser)
        add_int8_args(parser)
        declare_ranges(parser)

    @staticmethod
    def architecture(args):
        albert_act_base(args)

    def sentence_order(self, extra):
        """Scores of "in order" and "swapped", B x 2, from what the forward pass returned beside its output."""
        return self.encoder.sentence_order_head(extra["pooled"])


@register_model_architecture("albert_act", "albert_act")
@register_model_architecture("albert_act", "albert_act_base")
def albert_act_base(args):
    """Up to 24 applications; the published sizes, and what RoBERTa's classification heads ask for."""
    fill_defaults(
        args,
        encoder_layers=24,
        encoder_input_dim=128,
        encoder_embed_dim=768,
        encoder_ffn_embed_dim=3072,
        encoder_attention_heads=12,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        pooler_dropout=0.1,
        activation_fn="gelu",
        pooler_activation_fn="tanh",
        halting="act",
        depth_lora_rank=0,
        load_checkpoint_heads=False,
        quant_noise_pq=0.0,
        quant_noise_pq_block_size=8,
        spectral_norm_classification_head=False,
    )


@register_model_architecture("albert_act", "albert_act_small")
def albert_act_small(args):
    """Up to 12 applications."""
    fill_defaults(args, encoder_layers=12)
    albert_act_base(args)


@register_model_architecture("albert_act", "albert_act_tiny")
def albert_act_tiny(args):
    """Up to 6 applications."""
    fill_defaults(args, encoder_layers=6)
    albert_act_base(args)

"""Transkimmer, an encoder of BERT or RoBERTa that drops tokens from layer to layer: ``--arch transkimmer_base`` ...

Guan et al., *Transkimmer: Transformer Learns to Layer-wise Skim* (ACL 2022).
"""

import torch
from fairseq.models import register_model_architecture
from fairseq.models.roberta import RobertaEncoder, RobertaModel
from fairseq.models.roberta.model import base_architecture
from fairseq.modules.transformer_sentence_encoder import init_bert_params
from torch import nn

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.models.config import register_with_config
from fairseq_adaptive.models.defaults import fill_architecture, fill_defaults
from fairseq_adaptive.models.inner_states import inner_states, of_all_depths
from fairseq_adaptive.models.int8 import add_int8_args
from fairseq_adaptive.models.policy_flags import Policies, add_policy_args
from fairseq_adaptive.models.roberta_family import RobertaFamily, check_heads, check_length
from fairseq_adaptive.models.shared_stack import SharedTransformerEncoder
from fairseq_adaptive.models.sharing_flags import add_depth_lora_arg, sharing_config
from fairseq_adaptive.modules import STRATEGIES
from fairseq_adaptive.ranges import BIAS, LAYERS, POSITIVE_SHARE, SHARE, Range, declare_ranges


class SkimmingTransformer(SharedTransformerEncoder):
    """fairseq's encoder with token types, and predictors that skim tokens before each layer.

    Args:
        args: flags of the model
        dictionary: of the source
        embed_tokens: its embedding
    """

    def __init__(self, args, dictionary, embed_tokens):
        skimming = {"bias": args.skim_bias, "noise": args.skim_noise}
        if getattr(args, "router", None) not in (None, "none", "skimming"):
            skimming = None
        policies = Policies(args, "encoder", "none" if args.no_skimming else "skimming", skimming)
        super().__init__(sharing_config(args, ("encoder",), encoder=policies), dictionary, embed_tokens)
        self.layers.without_padding = True
        self.separator, self.protect_separators = dictionary.eos(), args.protect_separators
        self.embed_segments = nn.Embedding(args.token_types, embed_tokens.embedding_dim) if args.token_types else None

    def segments(self, src_tokens):
        """0 up to and with the first separator, then 1; B x T to B x T."""
        ends = src_tokens.eq(self.separator).long()
        return (ends.cumsum(1) - ends).clamp(max=self.embed_segments.num_embeddings - 1)

    def protected(self, src_tokens):
        """B x T, true at tokens that must not be skimmed: the first, and with ``--protect-separators`` separators."""
        protected = src_tokens.eq(self.separator) if self.protect_separators else torch.zeros_like(src_tokens).bool()
        protected[:, :1] = True
        return protected

    def forward(self, src_tokens, segments=None, return_all_hiddens=False, token_embeddings=None):
        """
        Args:
            src_tokens: B x T
            segments: B x T, token types
            return_all_hiddens: return the states of all depths, too
            token_embeddings: B x T x C, in place of those of ``src_tokens``

        Returns:
            states B x T x C; and :func:`~fairseq_adaptive.models.inner_states.inner_states` or None
        """
        states = self.embed_tokens(src_tokens) if token_embeddings is None else token_embeddings
        if self.embed_segments is not None:
            states = states + self.embed_segments(self.segments(src_tokens) if segments is None else segments)
        start = x = self.forward_embedding(src_tokens, states)[0].transpose(0, 1)  # T x B x C
        between, length = [] if return_all_hiddens else None, src_tokens.size(1)
        padding_mask = src_tokens.eq(self.padding_idx)
        padding_mask = padding_mask if padding_mask.any() else None
        x = self.layers(x, padding_mask, self.protected(src_tokens), reader=self.reader, states=between)
        x = x if self.reader is None else x[0][:length]
        inner = inner_states(self.layers, start, between, x, length)
        return (x if self.layer_norm is None else self.layer_norm(x)).transpose(0, 1), inner


class TranskimmerEncoder(RobertaEncoder):
    """RoBERTa's encoder and language modelling head around :class:`SkimmingTransformer`.

    Args:
        args: flags of the model
        dictionary: of the source

    Raises:
        UsageError: when flags contradict each other
    """

    def __init__(self, args, dictionary):
        super().__init__(args, dictionary)
        for name, module in self.named_modules():
            if hasattr(module, "normalized_shape") and ".router." not in name:
                module.eps = args.layer_norm_eps

    def build_encoder(self, args, dictionary, embed_tokens):
        if args.encoder_layerdrop and not args.no_skimming:
            raise UsageError("--encoder-layerdrop cannot be combined with skimming: leave it out, or add --no-skimming")
        if args.no_skimming and getattr(args, "router", None) == "skimming":
            raise UsageError("--no-skimming and --router skimming contradict each other: leave one of them out")
        check_heads(args)
        encoder = SkimmingTransformer(args, dictionary, embed_tokens)
        encoder.apply(init_bert_params)
        return encoder

    def forward(
        self, src_tokens, features_only=False, return_all_hiddens=False, masked_tokens=None, segments=None, **unused
    ):
        """
        Args:
            src_tokens: B x T, padded on the right
            features_only: leave out the word scores
            masked_tokens: B x T, score words only where it is true
            segments: B x T, token types (default: 0 up to and with the first ``</s>``, then 1)

        Returns:
            word scores B x T x V (M x V with ``masked_tokens``) or states B x T x C, where a skimmed token has the
            state that it was skimmed with; and a dict with ``inner_states``, see :meth:`extract_features`

        Raises:
            UsageError: for sequences longer than ``--max-positions``
        """
        check_length(src_tokens, self.args.max_positions)
        x, extra = self.extract_features(src_tokens, return_all_hiddens, segments, **unused)
        if features_only:
            return x, extra
        return self.output_layer(x, masked_tokens=of_all_depths(masked_tokens, x)), extra

    def extract_features(self, src_tokens, return_all_hiddens=False, segments=None, token_embeddings=None, **unused):
        """As RoBERTa's: B x T to B x T x C, and a dict with ``inner_states``, with ``return_all_hiddens`` a list of N + 1
        states T x B x C, before the first layer and after each."""
        x, states = self.sentence_encoder(src_tokens, segments, return_all_hiddens, token_embeddings)
        return x, {"inner_states": states}


@register_with_config("transkimmer")
class TranskimmerModel(RobertaFamily):
    """RoBERTa or BERT with skimming; stock ``sentence_prediction`` and ``masked_lm`` train it.

    Train with ``--criterion skim_loss``: without a price nothing is skimmed. Checkpoints of fairseq's RoBERTa load.
    """

    encoder_class = TranskimmerEncoder
    may_lack = ("router", "lm_head", "span_head")  # of an encoder that was trained elsewhere

    def __init__(self, args, encoder):
        super().__init__(args, encoder)
        self.span_head = None

    @staticmethod
    def add_args(parser):
        RobertaModel.add_args(parser)
        parser.add_argument(
            "--layer-sharing",
            choices=STRATEGIES,
            help="which unique layer serves which depth (Takase and Kiyono, 2021)",
        )
        parser.add_argument(
            "--encoder-unique-layers",
            type=LAYERS,
            metavar="M",
            help="how many layers have parameters of their own (default: all)",
        )
        parser.add_argument(
            "--token-types",
            type=Range(int, 0, 1024),
            metavar="N",
            help="token types that have embeddings: 2 in BERT, 0 in RoBERTa. The second begins after the first </s>",
        )
        parser.add_argument("--layer-norm-eps", type=POSITIVE_SHARE, metavar="E", help="1e-12 in BERT, 1e-5 in RoBERTa")
        parser.add_argument(
            "--protect-separators", action="store_true", help="never skim </s>, as the first token is never skimmed"
        )
        parser.add_argument(
            "--skim-bias",
            type=BIAS,
            metavar="B",
            help="how sure the predictors are at first that a token is kept (default: 5, as published; "
            "less where there are only some hundred updates)",
        )
        parser.add_argument(
            "--skim-noise",
            type=SHARE,
            metavar="S",
            help="share of the Gumbel noise in decisions of training, from 0 to 1 (default: 1, as "
            "published). With noise a model sees fewer tokens in training than in evaluation, where most "
            "of those that are likely to be kept are",
        )
        add_depth_lora_arg(parser)
        add_policy_args(parser)
        add_int8_args(parser)
        parser.add_argument("--no-skimming", action="store_true", help="no predictors: the dense model to compare with")
        declare_ranges(parser)

    @staticmethod
    def architecture(args):
        transkimmer_base(args)

    def register_span_head(self):
        """Add scores of "an answer begins here" and "ends here" for every token."""
        self.span_head = nn.Linear(self.args.encoder_embed_dim, 2)
        init_bert_params(self.span_head)

    def forward(self, src_tokens, spans=False, **kwargs):
        """As RoBERTa's; with ``spans``, scores B x 2 x T of each token for being an answer's first and last one."""
        if not spans:
            return super().forward(src_tokens, **kwargs)
        x, extra = self.encoder(src_tokens, features_only=True, **kwargs)
        return self.span_head(x).transpose(1, 2), extra


@register_model_architecture("transkimmer", "transkimmer")
@register_model_architecture("transkimmer", "transkimmer_base")
def transkimmer_base(args):
    """RoBERTa-base."""
    fill_architecture(args, base_architecture)
    fill_defaults(
        args,
        layer_sharing="cycle",
        depth_lora_rank=0,
        encoder_unique_layers=args.encoder_layers,
        token_types=0,
        layer_norm_eps=1e-5,
        protect_separators=False,
        no_skimming=False,
        skim_bias=5.0,
        skim_noise=1.0,
        load_checkpoint_heads=False,
        init="default",
        halting="none",
    )


@register_model_architecture("transkimmer", "transkimmer_large")
def transkimmer_large(args):
    """RoBERTa-large."""
    fill_defaults(
        args, encoder_layers=24, encoder_embed_dim=1024, encoder_ffn_embed_dim=4096, encoder_attention_heads=16
    )
    transkimmer_base(args)


@register_model_architecture("transkimmer", "transkimmer_bert_base")
def transkimmer_bert_base(args):
    """BERT-base: token types, another LayerNorm epsilon."""
    fill_defaults(args, token_types=2, layer_norm_eps=1e-12)
    transkimmer_base(args)


@register_model_architecture("transkimmer", "transkimmer_minilm_l6")
def transkimmer_minilm_l6(args):
    """MiniLM-L6-H384 (Wang et al., 2020), BERT's layout."""
    fill_defaults(args, encoder_layers=6, encoder_embed_dim=384, encoder_ffn_embed_dim=1536, encoder_attention_heads=12)
    transkimmer_bert_base(args)

"""Sentences with a tape from a learned bank: ``--arch adatape``, for stock ``--task sentence_prediction``.

Xue et al., *Adaptive Computation with Elastic Input Sequence* (ICML 2023).
"""

import dataclasses

from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.models import register_model_architecture
from fairseq.models.roberta import RobertaEncoder, RobertaModel, base_architecture
from fairseq.modules.transformer_sentence_encoder import init_bert_params

from fairseq_adaptive.compat.restoring import begins_anew
from fairseq_adaptive.models.adatape_flags import TapeConfig, build_tape, check_flags, tape_policies
from fairseq_adaptive.models.adatape_stack import run_tape, tape_report
from fairseq_adaptive.models.config import register_with_config
from fairseq_adaptive.models.defaults import fill_architecture, fill_defaults
from fairseq_adaptive.models.inner_states import inner_states, of_all_depths
from fairseq_adaptive.models.int8 import add_int8_args
from fairseq_adaptive.models.roberta_family import RobertaFamily, check_length
from fairseq_adaptive.models.shared_stack import SharedTransformerEncoder
from fairseq_adaptive.models.sharing_flags import add_sharing_args, sharing_architecture, sharing_config
from fairseq_adaptive.modules.policies.tape import LearnedBank
from fairseq_adaptive.ranges import BANK, declare_ranges

TAPE_DEFAULTS = {field.name: field.default for field in dataclasses.fields(TapeConfig) if field.name != "_name"}


class TapeTransformerEncoder(SharedTransformerEncoder):
    """fairseq's encoder, with a tape behind the sequence.

    Args:
        args: namespace with the flags of ``adatape``
        dictionary: of the text
        embed_tokens: its embedding
    """

    def __init__(self, args, dictionary, embed_tokens):
        check_flags(args, AdaTapeModel)
        cfg = sharing_config(args, ("encoder",), encoder=tape_policies(args))
        cfg.tape_ffn_embed_dim = args.tape_ffn_embed_dim if args.tape_tokens else 0
        super().__init__(cfg, dictionary, embed_tokens)
        self.apply(init_bert_params)
        self.tape = build_tape(args, args.encoder_embed_dim, args.encoder_attention_heads, args.encoder_layers)
        self.bank = None
        if self.tape is not None:
            self.layers.check_reader(self.tape)
            self.tape.reader.check_bank(args.tape_bank_size)
            self.bank = LearnedBank(args.tape_bank_size, args.encoder_embed_dim)

    def forward_scriptable(self, src_tokens, src_lengths=None, return_all_hiddens=False, token_embeddings=None):
        """
        Returns:
            fairseq's dictionary; ``encoder_states`` are without the tape, ``encoder_out`` is (T + S) x B x C with the tape at the
            end, ``encoder_padding_mask`` B x (T + S), and ``tape`` what
            :func:`~fairseq_adaptive.models.adatape_stack.tape_report` tells
        """
        padding_mask = src_tokens.eq(self.padding_idx)
        x, embedding = self.forward_embedding(src_tokens, token_embeddings)
        x = x.masked_fill(padding_mask.unsqueeze(-1), 0).transpose(0, 1)
        start, between, bank = x, [] if return_all_hiddens else None, None if self.bank is None else self.bank()
        given = padding_mask if padding_mask.any() else None
        x, mask, reading = run_tape(self.layers, x, given, self.tape, bank, states=between)
        states = inner_states(self.layers, start, between, x, src_tokens.size(1)) or []
        if self.layer_norm is not None:
            x = self.layer_norm(x)
        return {
            "encoder_out": [x],
            "encoder_padding_mask": [padding_mask if mask is None else mask],
            "encoder_embedding": [embedding],
            "encoder_states": states,
            "fc_results": [None] * (len(states) - 1) if states else [],
            "src_tokens": [],
            "src_lengths": [(~padding_mask).sum(1, keepdim=True)],
            "tape": tape_report(reading, bank, self.tape),
        }

    def upgrade_state_dict_named(self, state_dict, name):
        """Weights of a model without a tape load: the tape starts as it is."""
        super().upgrade_state_dict_named(state_dict, name)
        if begins_anew():  # fit_weights does more, and says so
            return state_dict
        tape = {f"{name}.{key}": value for key, value in self.state_dict().items() if "tape" in key or "bank" in key}
        if not any(key in state_dict for key in tape) and f"{name}.embed_tokens.weight" in state_dict:
            state_dict.update(tape)
        return state_dict


class AdaTapeEncoder(RobertaEncoder):
    def build_encoder(self, args, dictionary, embed_tokens):
        return TapeTransformerEncoder(args, dictionary, embed_tokens)

    def output_layer(self, features, masked_tokens=None, **unused):
        return super().output_layer(features, of_all_depths(masked_tokens, features))

    def extract_features(self, src_tokens, return_all_hiddens=False, **kwargs):
        """
        Args:
            src_tokens: B x T
            return_all_hiddens: return the states of all depths, too

        Returns:
            features B x T x C, without the tape, which did its work inside; and a dict with what ``tape_report`` tells,
            and ``inner_states``, with ``return_all_hiddens`` a list of N + 1 states T x B x C, before the first layer
            and after each

        Raises:
            UsageError: for sequences longer than ``--max-positions``
        """
        check_length(src_tokens, self.args.max_positions)
        out = self.sentence_encoder(
            src_tokens, return_all_hiddens=return_all_hiddens, token_embeddings=kwargs.get("token_embeddings")
        )
        features = out["encoder_out"][0][: src_tokens.size(1)].transpose(0, 1)
        return features, {"inner_states": out["encoder_states"] if return_all_hiddens else None, **out["tape"]}


@register_with_config("adatape")
class AdaTapeModel(RobertaFamily):
    """fairseq's RoBERTa with a tape from a learned bank, and with shared layers where asked.

    Plain RoBERTa checkpoints load: the tape starts from its initialisation.
    """

    encoder_class = AdaTapeEncoder

    @staticmethod
    def add_args(parser):
        RobertaModel.add_args(parser)
        gen_parser_from_dataclass(parser, TapeConfig(), delete_default=True)
        parser.add_argument("--tape-bank-size", type=BANK, metavar="N", help="entries of the learned bank")
        add_sharing_args(parser, ("encoder",))
        add_int8_args(parser)
        declare_ranges(parser, TapeConfig)

    @staticmethod
    def architecture(args):
        adatape(args)


@register_model_architecture("adatape", "adatape")
@register_model_architecture("adatape", "adatape_base")
def adatape(args):
    """The size of ``roberta_base``, a bank of 10,000."""
    fill_defaults(args, **TAPE_DEFAULTS, tape_bank_size=10000, layer_sharing="cycle")
    fill_architecture(args, base_architecture)
    fill_defaults(args, encoder_unique_layers=args.encoder_layers)
    sharing_architecture(args, ("encoder",))


@register_model_architecture("adatape", "adatape_tiny")
def adatape_tiny(args):
    """Width 128, two layers, a bank of 1,000: for tests and small data."""
    fill_defaults(
        args,
        encoder_embed_dim=128,
        encoder_ffn_embed_dim=256,
        encoder_attention_heads=4,
        encoder_layers=2,
        tape_bank_size=1000,
        tape_mlp_dim=128,
        tape_ffn_embed_dim=128,
    )
    adatape(args)

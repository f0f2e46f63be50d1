"""What the encoders with RoBERTa's interface have in common: albert_act, transkimmer and adatape."""

from argparse import Namespace

from fairseq.models.roberta import RobertaModel

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.models.defaults import flags, with_defaults
from fairseq_adaptive.models.fitting import ExplainsLoading
from fairseq_adaptive.models.int8 import RunsInInt8, as_asked
from fairseq_adaptive.modules import LayerStack
from fairseq_adaptive.ranges import check_ranges


class RobertaFamily(RunsInInt8, ExplainsLoading, RobertaModel):
    """A model with RoBERTa's interface and policies; stock ``masked_lm`` and ``sentence_prediction`` train it.

    Attributes:
        encoder_class: made from flags and a dictionary
        architecture: fills in the flags that are not given
    """

    encoder_class = architecture = None

    def __init__(self, args, encoder):
        super().__init__(args, encoder)
        for stack in (each for each in encoder.modules() if isinstance(each, LayerStack)):
            stack.reset_rules()  # RoBERTa's initialisation has overwritten theirs

    @classmethod
    def hub_models(cls):
        return {}

    def upgrade_state_dict_named(self, state_dict, name):
        """fairseq asks for a weight that heads with ``--spectral-norm-classification-head`` have in two parts."""
        ends = ".out_proj.weight_orig"
        asked = [key[: -len("_orig")] for key in state_dict if key.endswith(ends) and "classification_heads." in key]
        state_dict.update({key: state_dict[f"{key}_orig"] for key in asked})
        super().upgrade_state_dict_named(state_dict, name)
        for key in asked:
            state_dict.pop(key, None)
        return state_dict

    @classmethod
    def build_model(cls, args, task):
        args = Namespace(**flags(args))
        cls.architecture(args)
        args = with_defaults(args, getattr(cls, "__dataclass"))  # RoBERTa's flags whose defaults no architecture says
        check_ranges(args, cls)
        if getattr(args, "max_positions", None) is None:
            args.max_positions = _longest(args, task)
        return as_asked(cls(args, cls.encoder_class(args, task.source_dictionary)), args)


def _longest(args, task):
    """What ``--max-positions`` is where it is not given: the length that the task cuts its texts to."""
    for found in (args, getattr(task, "cfg", None), getattr(task, "args", None)):
        if getattr(found, "tokens_per_sample", None):
            return found.tokens_per_sample
    return task.max_positions()


def check_heads(args):
    """
    Raises:
        UsageError: when heads do not divide the width
    """
    if args.encoder_embed_dim % args.encoder_attention_heads:
        raise UsageError(
            f"--encoder-embed-dim {args.encoder_embed_dim} cannot be divided among {args.encoder_attention_heads} "
            "heads: choose another --encoder-attention-heads"
        )


def check_length(src_tokens, longest):
    """
    Args:
        src_tokens: ``[B, T]``
        longest: ``--max-positions``

    Raises:
        UsageError: for sequences that are longer
    """
    length = src_tokens.size(1)
    if length > longest:
        raise UsageError(f"a sequence of {length} tokens is longer than --max-positions {longest}")

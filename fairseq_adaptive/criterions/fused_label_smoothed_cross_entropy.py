"""fairseq's label-smoothed cross-entropy without the logits: ``--criterion fused_label_smoothed_cross_entropy``."""

import inspect

from fairseq.criterions import register_criterion
from fairseq.criterions.label_smoothed_cross_entropy import (
    LabelSmoothedCrossEntropyCriterion,
    LabelSmoothedCrossEntropyCriterionConfig,
)
from fairseq.models.transformer import TransformerDecoderBase
from torch import nn

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.models.segmented_decoder import SegmentedDecoder
from fairseq_adaptive.modules.layers.known import change, say_once
from fairseq_adaptive.modules.layers.prepacked_linear import LINEARS
from fairseq_adaptive.ops import label_smoothed_cross_entropy
from fairseq_adaptive.ranges import check_ranges


@register_criterion("fused_label_smoothed_cross_entropy", dataclass=LabelSmoothedCrossEntropyCriterionConfig)
class FusedLabelSmoothedCrossEntropy(LabelSmoothedCrossEntropyCriterion):
    """The same values, flags and log as ``label_smoothed_cross_entropy``, for less time and memory.

    The model gives features, and the loss is computed from them and the output projection in one pass, see
    :mod:`fairseq_adaptive.ops.cross_entropy`. It fits fairseq's Transformers and language models and those with shared
    layers. Losses of single tokens (``reduce=False``), and models whose scores another loss reads as well, are computed
    as fairseq does.

    Raises:
        UsageError: for numbers out of range; :meth:`check_model`, for a model without a projection
    """

    def __init__(self, task, sentence_avg, label_smoothing, ignore_prefix_size=0, report_accuracy=False):
        super().__init__(task, sentence_avg, label_smoothing, ignore_prefix_size, report_accuracy)
        check_ranges({"label_smoothing": label_smoothing, "ignore_prefix_size": ignore_prefix_size}, type(self))
        self.unfused = LabelSmoothedCrossEntropyCriterion(
            task, sentence_avg, label_smoothing, ignore_prefix_size, report_accuracy
        )

    def check_model(self, model) -> None:
        """Called before training starts; raises as :func:`output_projection`."""
        if not getattr(model, "needs_scores", False):
            output_projection(model)

    def forward(self, model, sample, reduce=True):
        """Return the loss, the sample size and the logging output; with ``reduce=False`` the loss of each token."""
        if not reduce or getattr(model, "needs_scores", False) or not scores_by_projection(model):
            return self.unfused(model, sample, reduce)
        sample = {**sample, "net_input": {**sample["net_input"], "features_only": True}}
        return super().forward(model, sample, reduce)

    def compute_loss(self, model, net_output, sample, reduce=True):
        """Return (loss, nll), each summed over the tokens of ``net_output[0]``, features ``[B, T, C]``."""
        projection = output_projection(model)
        features, target = net_output[0], model.get_targets(sample, net_output)
        if features.size(-1) != projection.in_features:
            raise UsageError(_unfit("its output is not that of features_only=True"))
        features, target = features[:, self.ignore_prefix_size :], target[:, self.ignore_prefix_size :]
        scored = target.ne(self.padding_idx)
        target = target[scored]
        loss, nll, right = label_smoothed_cross_entropy(
            features[scored], projection.weight, target, self.eps, projection.bias, count=self.report_accuracy
        )
        self.accuracy = right, scored.sum()
        return loss, nll

    def compute_accuracy(self, model, net_output, sample):
        """Return how many tokens :meth:`compute_loss` found right, and of how many."""
        return self.accuracy


def output_projection(model) -> nn.Linear:
    """Return the linear layer that makes scores of features in a fairseq model, also in a wrapped one.

    Raises:
        UsageError: when it has none
    """
    decoder = getattr(model, "decoder", None)
    if getattr(decoder, "adaptive_softmax", None) is not None:
        raise UsageError(_unfit("it has an adaptive softmax", "adaptive_cross_entropy"))
    projection = getattr(decoder, "output_projection", None)
    if not isinstance(projection, nn.Module) or "features_only" not in inspect.signature(decoder.forward).parameters:
        raise UsageError(_unfit("it has no decoder that gives features to a linear output projection"))
    return projection


def scores_by_projection(model) -> bool:
    """Whether a model's scores are its output projection of features and nothing more; else the log says what it does.

    Raises:
        UsageError: of :func:`output_projection`
    """
    why, decoder = change(output_projection(model), LINEARS), model.decoder
    if why is None and type(decoder).output_layer not in (
        TransformerDecoderBase.output_layer,
        SegmentedDecoder.output_layer,
    ):
        why = f"{type(decoder).__name__} has an output_layer of its own"
    if why is not None:
        say_once("fused cross-entropy", why)
    return why is None


def _unfit(reason, other="label_smoothed_cross_entropy"):
    name = "fused_label_smoothed_cross_entropy"
    return f"--criterion {name} does not fit this model: {reason}; train with --criterion {other}"

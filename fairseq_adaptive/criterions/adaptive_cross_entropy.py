"""Cross-entropy through an adaptive softmax: ``--criterion adaptive_cross_entropy``."""

from dataclasses import dataclass
from typing import Tuple

from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion
from fairseq.dataclass import FairseqDataclass
from fairseq.modules import AdaptiveSoftmax as FairseqAdaptiveSoftmax
from omegaconf import II
from torch import Tensor

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules.layers.known import is_plain
from fairseq_adaptive.modules.vocabulary.adaptive_softmax import clustered_cross_entropies
from fairseq_adaptive.ranges import DROPOUT, check_ranges, ranged


def softmax_of(model):
    """The adaptive softmax of a fairseq model.

    Raises:
        UsageError: when it has none
    """
    softmax = getattr(getattr(model, "decoder", None), "adaptive_softmax", None)
    if softmax is None:
        raise UsageError(
            "this model has no adaptive softmax: give it one with --adaptive-softmax-cutoff, or train it with "
            "--criterion cross_entropy"
        )
    return softmax


def adaptive_losses(
    model, net_output, target: Tensor, label_smoothing: float = 0.0, reduce: bool = False
) -> Tuple[Tensor, Tensor]:
    """Return (loss, nll), each ``[N]`` and at least float32, of the N targets that are not padding, in their order.

    With ``reduce``, return their sums, which our own softmax computes in one pass with the gradient.

    ``model.decoder.adaptive_softmax`` is ours or fairseq's. fairseq's own ``adaptive_loss`` takes the second word of
    every tail for padding and leaves it out, sums in half precision, and gives no gradient to a tail without a target,
    which DistributedDataParallel does not bear; nothing of that is so here.

    Args:
        model: a fairseq model with ``decoder.adaptive_softmax``, also wrapped for several workers
        net_output: what it returned; the first is the features ``[B, T, C]``
        target: ``[B, T]``
        label_smoothing: within each softmax that a target uses, see
            :meth:`fairseq_adaptive.modules.vocabulary.adaptive_softmax.AdaptiveSoftmax.forward`

    Raises:
        UsageError: when the model has no adaptive softmax, or a target is outside the vocabulary
    """
    decoder, softmax = getattr(model, "decoder", None), softmax_of(model)
    scored = target.ne(decoder.dictionary.pad())
    hidden, target = net_output[0][scored], target[scored]  # [N, C], [N]
    if not isinstance(softmax, FairseqAdaptiveSoftmax):
        if reduce and is_plain(softmax):
            return softmax.summed(hidden, target, label_smoothing)
        loss, nll = softmax(hidden, target, label_smoothing)
        return (loss.sum(), nll.sum()) if reduce else (loss, nll)
    hidden = softmax.dropout_module(hidden)
    loss, nll = clustered_cross_entropies(
        hidden, target, softmax.cutoff, softmax.head, lambda number, rows: softmax.tail[number](rows), label_smoothing
    )
    return (loss.sum(), nll.sum()) if reduce else (loss, nll)


@dataclass
class AdaptiveCrossEntropyConfig(FairseqDataclass):
    label_smoothing: float = ranged(
        0.0, DROPOUT, "epsilon for label smoothing within the head and within each cluster, 0 means none"
    )
    sentence_avg: bool = II("optimization.sentence_avg")


@register_criterion("adaptive_cross_entropy", dataclass=AdaptiveCrossEntropyConfig)
class AdaptiveCrossEntropy(FairseqCriterion):
    """Cross-entropy of an adaptive softmax (Grave et al. 2017), with any ``--ddp-backend``.

    Raises:
        UsageError: for numbers out of range; :meth:`check_model`, when the model has no such softmax
    """

    losses = staticmethod(adaptive_losses)

    def __init__(self, task, cfg):
        super().__init__(task)
        check_ranges(cfg, type(self))
        self.sentence_avg = cfg.sentence_avg
        self.label_smoothing = cfg.label_smoothing

    def check_model(self, model) -> None:
        """Called before training starts; raises as :func:`softmax_of`."""
        softmax_of(model)

    def forward(self, model, sample, reduce=True):
        """Return what :meth:`compute` does for the model's output."""
        return self.compute(model, model(**sample["net_input"]), sample, reduce)

    def compute(self, model, net_output, sample, reduce=True):
        """Return (loss, sample size, logging output).

        The loss is the sum over targets that are not padding, or with ``reduce=False`` that of each of them ``[N]``.
        """
        target = model.get_targets(sample, net_output)
        loss, nll = self.losses(model, net_output, target, self.label_smoothing, reduce)
        ntokens = int(target.ne(self.padding_idx).sum())
        sample_size = target.size(0) if self.sentence_avg else ntokens
        logging_output = {
            "loss": loss.detach().sum(),
            "nll_loss": nll.detach().sum(),
            "ntokens": ntokens,
            "nsentences": target.size(0),
            "sample_size": sample_size,
        }
        return loss, sample_size, logging_output

    @classmethod
    def reduce_metrics(cls, logging_outputs) -> None:
        """Log loss, nll_loss and its perplexity, in base 2, over all workers."""
        LabelSmoothedCrossEntropyCriterion.reduce_metrics(logging_outputs)

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        return True

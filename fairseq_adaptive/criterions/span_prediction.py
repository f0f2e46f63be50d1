"""The loss of question answering: ``--criterion span_prediction``."""

import math
from dataclasses import dataclass

import torch.nn.functional as F
from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.dataclass import FairseqDataclass
from fairseq.logging import metrics

from fairseq_adaptive.errors import UsageError


@dataclass
class SpanPredictionConfig(FairseqDataclass):
    """No flags; with it, hydra finds ``criterion=span_prediction``."""


@register_criterion("span_prediction", dataclass=SpanPredictionConfig)
class SpanPrediction(FairseqCriterion):
    """Mean of the cross-entropies of an answer's first and last place, 0 where a window has no answer (Devlin et al.,
    2019, section 4.3)."""

    def check_model(self, model) -> None:
        """Called before training starts.

        Raises:
            UsageError: for a model without a span head
        """
        if getattr(model, "span_head", None) is None:
            raise UsageError(
                "--criterion span_prediction needs --task question_answering and a model that it can "
                "give a span head, such as --arch transkimmer_base"
            )

    def forward(self, model, sample, reduce=True):
        """Return loss (a sum over windows), how many there are, and logging output; raises as :meth:`check_model`."""
        self.check_model(model)
        tokens, target = sample["net_input"]["src_tokens"], sample["target"]  # B x 2
        scores = model(**sample["net_input"], spans=True)[0].float()  # B x 2 x T
        scores = scores.masked_fill(tokens.eq(self.padding_idx).unsqueeze(1), float("-inf"))
        losses = F.cross_entropy(scores.flatten(0, 1), target.flatten(), reduction="none").view_as(target).mean(1)
        count = target.size(0)
        correct = (scores.argmax(-1) == target).all(1).sum()
        return (
            losses.sum() if reduce else losses,
            count,
            {
                "loss": losses.sum().detach(),
                "ncorrect": correct,
                "ntokens": sample["ntokens"],
                "nsentences": count,
                "sample_size": count,
            },
        )

    @staticmethod
    def reduce_metrics(logging_outputs) -> None:
        """Log the loss (base 2) and the share of windows in which both places are right."""
        loss, correct, count = (
            float(sum(log.get(name, 0) for log in logging_outputs)) for name in ("loss", "ncorrect", "sample_size")
        )
        metrics.log_scalar("loss", loss / count / math.log(2), count, round=3)
        metrics.log_scalar("accuracy", 100 * correct / count, count, round=1)

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        return True

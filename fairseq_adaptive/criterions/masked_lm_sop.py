"""Masked words and the order of two parts: ``--criterion masked_lm_sop``."""

import math
from dataclasses import dataclass

import torch.nn.functional as F
from fairseq import utils
from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.dataclass import FairseqDataclass
from fairseq.logging import metrics

from fairseq_adaptive.errors import UsageError

OURS = ("fairseq", "fairseq_adaptive")
SUMS = ("loss", "mlm_loss", "sop_loss", "mlm_correct", "sop_correct", "sample_size", "nsentences")


@dataclass
class MaskedLMSOPConfig(FairseqDataclass):
    pass


@register_criterion("masked_lm_sop", dataclass=MaskedLMSOPConfig)
class MaskedLMSOPLoss(FairseqCriterion):
    """Mean cross-entropy of the masked words + that of the order of the two parts (Lan et al., 2020, section 3.1).

    The sample size is the number of masked words.

    Raises:
        UsageError: for data or a model without the order of two parts
    """

    def __init__(self, cfg, task):
        super().__init__(task)
        self.words = len(task.target_dictionary)

        # a task of another package may give the order, too: its samples tell
        self.knows_order = hasattr(task, "orders_parts") or type(task).__module__.partition(".")[0] not in OURS

    def check_model(self, model) -> None:
        """Called before training starts.

        Raises:
            UsageError: for a task that does not say which order two parts have, or a model without a head for it
        """
        self._check(model, self.knows_order)

    @staticmethod
    def _check(model, knows_order):
        if not knows_order:
            raise UsageError("--criterion masked_lm_sop needs to know the order of parts: use --task masked_lm_sop")
        if not hasattr(model, "sentence_order"):
            raise UsageError(
                "--criterion masked_lm_sop needs a model with a sentence order head, such as --arch albert_act_base"
            )

    def forward(self, model, sample, reduce=True):
        """Return loss (a sum, to be divided by the sample size), sample size and logging output, sums all; raises as
        :meth:`check_model`."""
        self._check(model, "swapped" in sample)
        swapped, masked = sample["swapped"], sample["target"].ne(self.padding_idx)  # B, B x T
        words, extra = model(**sample["net_input"], masked_tokens=masked)
        orders, targets = model.sentence_order(extra), sample["target"][masked]
        mlm_loss = F.cross_entropy(words.float(), targets, reduction="sum")
        sop_loss = F.cross_entropy(orders.float(), swapped, reduction="sum")
        sample_size, sentences = len(targets), len(swapped)
        loss = mlm_loss + sop_loss * (sample_size / sentences)
        # an expectation over depths has one more class than there are words or orders
        return (
            loss,
            sample_size,
            {
                "loss": loss.detach(),
                "mlm_loss": mlm_loss.detach(),
                "sop_loss": sop_loss.detach(),
                "mlm_correct": (words[:, : self.words].argmax(-1) == targets).sum(),
                "sop_correct": (orders[:, :2].argmax(-1) == swapped).sum(),
                "sample_size": sample_size,
                "ntokens": sample["ntokens"],
                "nsentences": sentences,
            },
        )

    @classmethod
    def reduce_metrics(cls, logging_outputs) -> None:
        """Log losses in bits, perplexity of masked words and both accuracies in percent."""
        sums = {name: float(sum(output.get(name, 0) for output in logging_outputs)) for name in SUMS}
        masked, sentences = sums["sample_size"], sums["nsentences"]
        if not masked:
            return
        metrics.log_scalar("loss", sums["loss"] / masked / math.log(2), masked, round=3)
        metrics.log_scalar("mlm_loss", sums["mlm_loss"] / masked / math.log(2), masked, round=3)
        metrics.log_scalar("sop_loss", sums["sop_loss"] / sentences / math.log(2), sentences, round=3)
        metrics.log_derived("ppl", lambda meters: utils.get_perplexity(meters["mlm_loss"].avg))
        metrics.log_scalar("mlm_accuracy", 100 * sums["mlm_correct"] / masked, masked, round=2)
        metrics.log_scalar("sop_accuracy", 100 * sums["sop_correct"] / sentences, sentences, round=2)

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        return True

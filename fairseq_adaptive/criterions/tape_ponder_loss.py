"""Classification with a price on reading: ``--criterion tape_ponder_loss``.

Xue et al., *Adaptive Computation with Elastic Input Sequence* (ICML 2023), section 3.2.
"""

import math
from dataclasses import dataclass, field

from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.dataclass import FairseqDataclass
from fairseq.logging import metrics
from torch.nn import functional as F

from fairseq_adaptive.criterions.adaptive_compute_loss import AdaptiveComputeLoss
from fairseq_adaptive.criterions.decisions import log_flops, spent_on
from fairseq_adaptive.ranges import DROPOUT, PRICE, ranged


@dataclass
class TapePonderLossConfig(FairseqDataclass):
    ponder_penalty: float = ranged(0.01, PRICE, "weight of the mean ponder cost of a sequence")
    label_smoothing: float = ranged(0.0, DROPOUT, "epsilon for label smoothing, 0 means no label smoothing")
    classification_head_name: str = field(
        default="sentence_classification_head",
        metadata={"help": "name of the classification head to use, where the model has several"},
    )
    regression_target: bool = field(
        default=False, metadata={"help": "targets are numbers: squared error instead of cross-entropy"}
    )


class Classification(FairseqCriterion):
    """Cross-entropy or squared error of a sequence. Targets are classes, B, or their probabilities, B x classes."""

    def __init__(self, cfg, task):
        super().__init__(task)
        self.cfg = cfg

    def forward(self, model, sample, reduce=True):
        inputs = sample["net_input"]
        if hasattr(model, "classification_heads"):
            inputs = {**inputs, "features_only": True, "classification_head_name": self.cfg.classification_head_name}
        logits, extra = model(**inputs)
        target, size = sample["target"], logits.size(0)
        if self.cfg.regression_target:
            loss = F.mse_loss(logits.view(-1).float(), target.view(-1).float(), reduction="sum")
        else:
            target = target.view(-1) if target.dim() < 2 or target.size(1) == 1 else target
            log_probs = model.get_normalized_probs((logits, extra), log_probs=True)
            shares = F.one_hot(target, log_probs.size(1)) if target.dim() == 1 else target
            smoothing = self.cfg.label_smoothing * model.training
            loss = -((1 - smoothing) * shares * log_probs + smoothing * log_probs / log_probs.size(1)).sum()
        log = {"task_loss": loss.detach(), "ntokens": sample["ntokens"], "nsentences": size, "sample_size": size}
        if not self.cfg.regression_target:
            best = target if target.dim() == 1 else target.argmax(1)
            log["ncorrect"] = (log_probs.argmax(1) == best).sum()
        return loss, size, log

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        return True


@register_criterion("tape_ponder_loss", dataclass=TapePonderLossConfig)
class TapePonderLoss(AdaptiveComputeLoss):
    """Cross-entropy or squared error, plus the ponder cost of the tape; without a tape, the first alone.

    Where tokens halt or are skimmed, too, it may be the ``--task-criterion`` of ``adaptive_compute_loss``, which adds
    the price of that.

    Raises:
        UsageError: for impossible flags
    """

    kinds, needs, task_class = ("reader",), None, Classification

    def __init__(self, cfg, task):
        super().__init__(cfg, task, Classification(cfg, task))

    def steering(self):
        return {}

    def options(self, decision):
        return {"weight": self.cfg.ponder_penalty}

    def report(self, log, found, terms, price, loss, size):
        log["loss"] = loss.detach()
        for each in found:
            if each.trace.reading is None:
                continue
            lengths, reading = each.trace.tape_len, each.trace.reading
            used, entries = reading.used()
            log.update(
                ponder_cost=reading.cost.detach().sum(), tape_tokens=lengths.sum(), bank_used=used, bank_entries=entries
            )
            log.update(spent_on([each], "tape_"))
            log.update((f"tape_len_{length}", (lengths == length).sum()) for length in range(each.policy.room + 1))

    @classmethod
    def reduce_metrics(cls, logging_outputs) -> None:
        total = {key: sum(float(log.get(key, 0)) for log in logging_outputs) for key in logging_outputs[0]}
        size = total["sample_size"]
        metrics.log_scalar("loss", total["loss"] / size / math.log(2), size, round=4)
        metrics.log_scalar("task_loss", total["task_loss"] / size / math.log(2), size, round=4)
        if "ncorrect" in total:
            metrics.log_scalar("accuracy", 100 * total["ncorrect"] / size, size, round=2)
        if "ponder_cost" in total:
            metrics.log_scalar("ponder_cost", total["ponder_cost"] / size, size, round=3)
            metrics.log_scalar("tape_len", total["tape_tokens"] / size, size, round=3)
            metrics.log_scalar("bank_used", total["bank_used"] / total["bank_entries"], total["bank_entries"], round=4)
            log_flops(total, "tape_")
            lengths = [key for key in total if key.startswith("tape_len_")]
            for key in lengths:
                metrics.log_scalar(f"_{key}", total[key] / size, size)
            metrics.log_derived("tape_lens", lambda meters: _histogram(meters, lengths))

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        return True


def _histogram(meters, lengths):
    shares = ((key.rpartition("_")[2], meters[f"_{key}"].avg) for key in lengths)
    return " ".join(f"{length}:{share:.3f}" for length, share in shares if share > 0)

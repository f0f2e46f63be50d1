"""Classification with a price on reading: ``--criterion tape_ponder_loss``.

Xue et al., *Adaptive Computation with Elastic Input Sequence* (ICML 2023), section 3.2.
"""

import math
from dataclasses import dataclass, field

import torch
from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.dataclass import FairseqDataclass
from fairseq.logging import metrics
from torch.nn import functional as F

from fairseq_adaptive.modules import recording
from fairseq_adaptive.ranges import DROPOUT, PRICE, check_ranges, ranged


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


@register_criterion("tape_ponder_loss", dataclass=TapePonderLossConfig)
class TapePonderLoss(FairseqCriterion):
    """Cross-entropy or squared error, plus the ponder cost of the tape; without a tape, the first alone.

    Where tokens halt or are skimmed, too, it is the ``--task-criterion`` of ``ponder_loss`` or ``skim_loss``, which add
    the price of that. Works with models that return logits B x classes and a dictionary that holds a ``tape``
    (:class:`~fairseq_adaptive.modules.policies.tape.Reading`), its ``bank_size`` and whether it is ``bank_shared``.
    Targets are classes, B, or their probabilities, B x classes.

    Raises:
        UsageError: for impossible flags
    """

    def __init__(self, cfg, task):
        super().__init__(task)
        check_ranges(cfg, type(self))
        self.cfg = cfg

    def forward(self, model, sample, reduce=True):
        inputs = sample["net_input"]
        if hasattr(model, "classification_heads"):
            inputs = {**inputs, "features_only": True, "classification_head_name": self.cfg.classification_head_name}
        with recording(model) as traces:
            logits, extra = model(**inputs)
        target, size = sample["target"], logits.size(0)
        if self.cfg.regression_target:
            task_loss = F.mse_loss(logits.view(-1).float(), target.view(-1).float(), reduction="sum")
        else:
            target = target.view(-1) if target.dim() < 2 or target.size(1) == 1 else target
            log_probs = model.get_normalized_probs((logits, extra), log_probs=True)
            shares = F.one_hot(target, log_probs.size(1)) if target.dim() == 1 else target
            smoothing = self.cfg.label_smoothing * model.training
            task_loss = -((1 - smoothing) * shares * log_probs + smoothing * log_probs / log_probs.size(1)).sum()
        loss = task_loss
        log = {"task_loss": task_loss.detach(), "ntokens": sample["ntokens"], "nsentences": size, "sample_size": size}
        if not self.cfg.regression_target:
            best = target if target.dim() == 1 else target.argmax(1)
            log["ncorrect"] = (log_probs.argmax(1) == best).sum()
        if extra.get("tape") is not None:
            cost = extra["tape"].cost.sum()
            loss = loss + self.cfg.ponder_penalty * cost
            (trace,) = (trace for each in traces.values() for trace in each)
            log.update(ponder_cost=cost.detach(), **tape_sums(lengths=trace.tape_len, **extra))
        log["loss"] = loss.detach()
        return loss, size, log

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


def tape_sums(lengths, tape, bank_size, bank_shared, max_tokens, **unused):
    """What is logged of a reading, as sums over the rows of a batch.

    Args:
        lengths: B, how many tape tokens there were
        tape: the Reading
        bank_size: N
        bank_shared: count an entry once a batch, not once a row
        max_tokens: the longest tape that could be

    Returns:
        ``tape_tokens``, ``tape_len_0`` ... (rows with a tape of that length), ``bank_used`` of ``bank_entries``
    """
    rows = tape.entries.flatten(1)  # B x (S K)
    read = torch.zeros(len(rows), bank_size + 1, dtype=torch.bool, device=rows.device)
    read = read.scatter(1, rows.where(rows >= 0, bank_size), True)[:, :bank_size]
    if bank_shared:
        read = read.any(0)
    sums = {f"tape_len_{length}": (lengths == length).sum() for length in range(max_tokens + 1)}
    return {**sums, "tape_tokens": lengths.sum(), "bank_used": read.sum(), "bank_entries": read.numel()}

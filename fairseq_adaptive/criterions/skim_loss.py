"""The loss of models that skim tokens: ``--criterion skim_loss``, a task's loss and the price of a kept token."""

import math
from dataclasses import dataclass, field
from typing import Optional

from fairseq.criterions import register_criterion
from fairseq.logging import metrics

from fairseq_adaptive.criterions.adaptive_compute_loss import AdaptiveComputeLoss
from fairseq_adaptive.criterions.decisions import log_flops, spent_on
from fairseq_adaptive.criterions.task_criterion import DistillationConfig
from fairseq_adaptive.ranges import POSITIVE_SHARE, PRICE, UPDATES, ranged


@dataclass
class SkimLossConfig(DistillationConfig):
    task_criterion: str = field(
        default="sentence_prediction",
        metadata={"help": "the criterion of the task, by the name that --criterion has for it"},
    )
    skim_factor: float = ranged(0.5, PRICE, "price of keeping all tokens in all layers (lambda of Guan et al., 2022)")
    skim_warmup_updates: int = ranged(
        0, UPDATES, "updates in which that price rises from 0, or the target falls from 1"
    )
    target_flops: Optional[float] = ranged(
        None,
        POSITIVE_SHARE,
        "share of the dense model's FLOPs to steer to, predictors included; takes the place of "
        "--skim-factor, in either direction",
    )
    target_flops_gain: float = ranged(1.0, PRICE, "price of keeping all tokens when the share is 1 above the target")
    target_flops_rate: Optional[float] = ranged(
        None,
        PRICE,
        "by how much that price grows in an update while the share stays there (default: 0.01, and more in trainings of "
        "fewer than 1,000 updates)",
    )


@register_criterion("skim_loss", dataclass=SkimLossConfig)
class SkimLoss(AdaptiveComputeLoss):
    """Loss of the task + lambda x mean over layers of the share of kept tokens (Guan et al., 2022, section 3.4).

    With a target the price follows the FLOPs of the decisions that evaluation would make; that is our own. The mean is
    over the tokens of a batch, padding never counts, and the logged ``loss`` is that of the task alone. Only skimming
    is priced: :class:`~fairseq_adaptive.criterions.adaptive_compute_loss.AdaptiveComputeLoss` prices all that a model has.

    Args:
        cfg: :class:`SkimLossConfig`
        task, task_criterion, errors: of :class:`~fairseq_adaptive.criterions.adaptive_compute_loss.AdaptiveComputeLoss`
    """

    kinds, mark = ("router",), "skim_"
    needs = "skim_loss needs a model that skims, such as --arch transkimmer_base without --no-skimming;"

    def steering(self):
        cfg = self.cfg
        return {
            "flops": {
                "value": cfg.target_flops,
                "gain": cfg.target_flops_gain,
                "rate": cfg.target_flops_rate,
                "warmup_updates": cfg.skim_warmup_updates,
            }
        }

    def options(self, decision):
        return {"weight": self.cfg.skim_factor, "warmup_updates": self.cfg.skim_warmup_updates}

    def report(self, log, found, terms, price, loss, size):
        log.update(skim_loss=price.detach() * size, skim_samples=size, skim_factor=terms[0][0] * size)
        log.update(spent_on(found, "skim_"))
        for each in found:
            for name, (count, there) in each.policy.measures(each.trace).items():
                if name.startswith("kept_"):
                    log[f"skim_{name}"] = log.get(f"skim_{name}", 0) + count
                    log[f"skim_of_{name}"] = log.get(f"skim_of_{name}", 0) + there

    @classmethod
    def reduce_prices(cls, totals) -> None:
        """Log the price and its factor; the share of tokens kept, of all layers and of each; FLOPs and the speed-up
        that they promise."""
        samples = totals.get("skim_samples", 0.0)
        if not samples:
            return
        metrics.log_scalar("skim_loss", totals["skim_loss"] / samples / math.log(2), samples, round=4)
        metrics.log_scalar("skim_factor", totals["skim_factor"] / samples, samples, round=4)
        if "skim_distance" in totals:
            metrics.log_scalar("distance", totals["skim_distance"] / samples / math.log(2), samples, round=4)
        layers = [name for name in totals if name.startswith("skim_kept_")]
        there = {name: totals[name.replace("skim_", "skim_of_", 1)] for name in layers}
        every = sum(there.values())
        if every:
            metrics.log_scalar("kept", sum(totals[name] for name in layers) / every, every, round=4)
        for name, of in there.items():
            if of:
                metrics.log_scalar(name[len("skim_") :], totals[name] / of, of, round=4)
        log_flops(totals, "skim_")

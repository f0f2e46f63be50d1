"""The loss of models in which tokens halt: ``--criterion ponder_loss``, a task's loss and the price of depth."""

import math
from dataclasses import dataclass
from typing import Optional

from fairseq.criterions import register_criterion
from fairseq.logging import metrics

from fairseq_adaptive.criterions.adaptive_compute_loss import AdaptiveComputeLoss
from fairseq_adaptive.criterions.controller import DEPTH
from fairseq_adaptive.criterions.decisions import log_flops, spent_on
from fairseq_adaptive.criterions.task_criterion import TaskCriterionConfig
from fairseq_adaptive.ranges import PRICE, RATE, UPDATES, ranged


@dataclass
class PonderLossConfig(TaskCriterionConfig):
    time_penalty: float = ranged(
        0.01,
        PRICE,
        "price of n + r, updates and remainder, of a token on average (Graves, 2016). The published "
        "penalties of ALBERT-ACT are for the sum over a sequence: multiply them by its length",
    )
    time_penalty_warmup_updates: int = ranged(
        0, UPDATES, "updates in which the penalty rises from 0, so that the model finds a use for depth"
    )
    target_depth: Optional[float] = ranged(
        None, DEPTH, "mean number of updates to steer to; takes the place of --time-penalty, in either direction"
    )
    target_depth_weight: float = ranged(0.1, PRICE, "weight of the steering when the depth is twice the target")
    target_depth_rate: Optional[float] = ranged(
        None,
        PRICE,
        "by how much of that weight it grows in an update while the depth stays there (default: 0.01, and more in "
        "trainings of fewer than 1,000 updates)",
    )
    prior_rate: Optional[float] = ranged(
        None, RATE, "PonderNet: rate of the geometric prior; 1 over the depth to aim at (default: the rule's own, 0.2)"
    )
    kl_weight: float = ranged(0.01, PRICE, "PonderNet: weight of the divergence from the prior")


@register_criterion("ponder_loss", dataclass=PonderLossConfig)
class PonderLoss(AdaptiveComputeLoss):
    """Loss of the task + time penalty x mean (n + r) (Graves, 2016), or PonderNet's expected loss + KL to a prior.

    With a target depth a controller pushes the halting unit's logits up or down instead; that is our own. Only depth is
    priced: :class:`~fairseq_adaptive.criterions.adaptive_compute_loss.AdaptiveComputeLoss` prices all that a model has.

    The mean is over the tokens of a stack; several stacks (encoder and decoder) add up. The logged ``loss`` is that of
    the task alone. Padding never counts.

    Args:
        cfg: :class:`PonderLossConfig`
        task, task_criterion, errors: of :class:`~fairseq_adaptive.criterions.adaptive_compute_loss.AdaptiveComputeLoss`
    """

    kinds, mark = ("halting",), "ponder_"
    needs = "ponder_loss needs a model in which tokens halt: add --halting act,"
    advice = (
        "a lower --time-penalty (with PonderNet a lower --prior-rate) or with --time-penalty-warmup-updates",
        "raise --time-penalty (with PonderNet --prior-rate or --kl-weight)",
    )

    def steering(self):
        cfg = self.cfg
        return {"depth": {"value": cfg.target_depth, "rate": cfg.target_depth_rate, "weight": cfg.target_depth_weight}}

    def options(self, decision):
        cfg = self.cfg
        if decision.trace.distribution is None:
            return {"weight": cfg.time_penalty, "warmup_updates": cfg.time_penalty_warmup_updates}
        return {"weight": cfg.kl_weight, **({} if cfg.prior_rate is None else {"prior_rate": cfg.prior_rate})}

    def report(self, log, found, terms, price, loss, size):
        log.update(ponder_loss=price.detach() * size, ponder_samples=size)
        for each in found:
            prefix = f"{each.side}_ponder_" if len(found) > 1 else "ponder_"
            log[f"{prefix}tokens"] = each.trace.tokens.sum()
            log.update(spent_on([each], prefix))
            for name, (value, _) in each.policy.measures(each.trace).items():
                log[prefix + name.replace("depth_", "share_")] = value

    @classmethod
    def reduce_prices(cls, totals) -> None:
        """Log the price of depth, depth, remainder, at_limit, the histogram, and FLOPs, of each side."""
        samples = totals["ponder_samples"]
        if samples:
            metrics.log_scalar("ponder_loss", totals["ponder_loss"] / samples / math.log(2), samples, round=4)
        for name, value in totals.items():
            side, _, measure = name.partition("ponder_")
            tokens = totals.get(f"{side}ponder_tokens")
            if tokens and (measure in ("depth", "remainder", "at_limit") or measure.startswith("share_")):
                digits = 3 if measure == "depth" else 4
                metrics.log_scalar(side + measure.replace("share_", "depth_"), value / tokens, tokens, round=digits)
            if measure == "dense":
                log_flops(totals, f"{side}ponder_", side)

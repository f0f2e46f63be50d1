"""Choosing the best checkpoint among those that keep to a target: ``--best-checkpoint-metric accuracy_on_target``.

The name of any logged value with ``_on_target`` behind it is that value where the model spends at most 3% more than its
target, and where it spends more is worse than any that does not, the more it spends the worse.
"""

from typing import Dict, NamedTuple, Optional

from fairseq.logging import metrics
from omegaconf import OmegaConf

from fairseq_adaptive.criterions.controller import TOLERANCE
from fairseq_adaptive.errors import UsageError

SUFFIX = "_on_target"
FAR = 1e6  # worse than any quality by this, for each target that is spent above the tolerance


class Wanted(NamedTuple):
    """What ``--best-checkpoint-metric`` asks for: the value, and whether the highest is the best."""

    quality: str
    maximize: bool


def wanted(cfg) -> Optional[Wanted]:
    """What the checkpoint flags around a criterion's configuration ask for; None: no value on target, and for the
    criterion of a task within another."""
    root = cfg._get_root() if OmegaConf.is_config(cfg) else {}
    if OmegaConf.select(root, "criterion._name") != cfg.get("_name"):
        return None
    checkpoint = root.get("checkpoint") or {}
    name = str(checkpoint.get("best_checkpoint_metric") or "")
    if not name.endswith(SUFFIX):
        return None
    return Wanted(name[: -len(SUFFIX)], bool(checkpoint.get("maximize_best_checkpoint_metric")))


def miss(spent: float, target: float) -> float:
    """By how many targets a model spends too much, beyond the tolerance; 0 where it keeps to it."""
    return max(0.0, spent / target - 1 - TOLERANCE)


def log_on_target(asked: Optional[Wanted], targets: Dict[str, float], sums: Dict[str, float], evaluated: bool):
    """Log what was spent of each target, hidden, and the value on target.

    Args:
        asked: of :func:`wanted`
        targets: names and values
        sums: ``NAME_spent`` and ``NAME_of`` of each, summed over the batches
        evaluated: whether these are batches of an evaluation, in which the value must be there

    Raises:
        UsageError: when nothing logs it in an evaluation
    """
    for name in targets:
        if sums.get(f"{name}_of"):
            metrics.log_scalar(f"_spent_{name}", sums[f"{name}_spent"] / sums[f"{name}_of"], sums[f"{name}_of"])
    if asked is None:
        return

    def on_target(meters):
        if asked.quality not in meters:
            if evaluated:
                known = sorted(name for name in meters if not name.startswith("_") and not name.endswith(SUFFIX))
                raise UsageError(
                    f"--best-checkpoint-metric {asked.quality}{SUFFIX}: nothing logs {asked.quality!r} in an evaluation: "
                    f"name one of {', '.join(f'{name}{SUFFIX}' for name in known)}"
                )
            return float("nan")  # some values are there in evaluations alone
        far = sum(
            miss(meters[f"_spent_{name}"].avg, value) for name, value in targets.items() if f"_spent_{name}" in meters
        )
        value = meters.get_smoothed_value(asked.quality)
        return value - FAR * far if asked.maximize else value + FAR * far

    metrics.log_derived(f"{asked.quality}{SUFFIX}", on_target)

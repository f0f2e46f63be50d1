"""Trainings that would train something else than their flags say: refused, or one warning where it can be meant.

:func:`check_setup` is asked before a training starts, when task, model and criterion are there. What it says of flags holds
for trainings alone: models from checkpoints are taken as they are.
"""

import logging
from typing import Dict, List

from torch import nn

from fairseq_adaptive.criterions.decisions import Decision, decisions
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.models.defaults import flags
from fairseq_adaptive.models.without_effect import check_criterion_flags, check_model_flags

logger = logging.getLogger(__name__)
REPORTS = ("report_mcc", "report_acc_and_f1", "report_pearson_and_spearman")  # of sentence_prediction


def check_setup(cfg, model: nn.Module, criterion: nn.Module):
    """
    Args:
        cfg: fairseq's configuration
        model, criterion: of the training

    Raises:
        UsageError: for flags that contradict each other, or change nothing
    """
    found = decisions(model)
    if _ours(type(model)):
        if flags(cfg.model).get("int8"):
            raise UsageError(
                "--int8 is for inference: leave it out of a training, and use fairseq-adaptive predict --int8, or "
                "fairseq-validate --model-overrides \"{'int8': True}\""
            )
        check_model_flags(flags(cfg.model), type(model))
    if _ours(type(criterion)) and getattr(type(criterion), "__dataclass", None):
        check_criterion_flags(flags(cfg.criterion), type(criterion), [each.policy for each in found])
    _check_targets(found, criterion)
    _check_reported(cfg, criterion)
    _warn_of_free_policies(found, criterion)
    _warn_of_plain_optimizer(flags(cfg.optimizer) if cfg.optimizer is not None else {}, model)


def _ours(owner) -> bool:
    return owner.__module__.startswith("fairseq_adaptive.")


def _criterions(criterion) -> List:
    """A criterion, and those that it wraps."""
    inner = getattr(criterion, "task_criterion", None)
    return [criterion, *(_criterions(inner) if inner is not None else [])]


def _check_targets(found: List[Decision], criterion):
    for each in _criterions(criterion):
        if getattr(each, "follow_compute", None) is not None and each.compute is not None:
            each.follow_compute(found)
        for kind, controller in getattr(each, "controllers", {}).items():
            steered = [decision.policy for decision in found if decision.policy.kind == kind]
            if controller.value is not None and steered and all(policy.unsteered for policy in steered):
                reasons = {policy.policy_name: policy.unsteered for policy in steered}
                said = "; ".join(f"{name}, {reason}" for name, reason in reasons.items())
                raise UsageError(f"{controller.target.flag} cannot steer {said}")


def _check_reported(cfg, criterion):
    """fairseq makes numbers of labels where it reports these, in the first validation."""
    for each in _criterions(criterion):
        asked = [name for name in REPORTS if getattr(each, name, False)]
        words = getattr(each, "label_dict", None)
        if asked and words is not None and not getattr(each, "regression_target", False):
            labels = words.symbols[words.nspecial :][: cfg.task.num_classes]
            texts = [label for label in labels if not label.isdecimal()]
            if texts:
                raise UsageError(
                    f"--{asked[0].replace('_', '-')} needs labels that are numbers, such as 0 and 1, and here they are "
                    f"{', '.join(texts[:3])}: leave it out, or binarise the labels as numbers"
                )


def _warn_of_free_policies(found: List[Decision], criterion):
    """Of policies that learn from their price, and have none here."""
    priced = {kind for each in _criterions(criterion) for kind in getattr(each, "kinds", ())}
    free = {each.policy.policy_name or type(each.policy).__name__: each for each in found}
    free = [name for name, each in free.items() if each.policy.priced and each.policy.kind not in priced]
    if free:
        logger.warning(
            "%s: the loss has no price of it, and the task alone gives no reason to spend less. "
            "--criterion adaptive_compute_loss adds the prices of all policies to any --task-criterion",
            ", ".join(free),
        )


def _warn_of_plain_optimizer(optimizer: Dict, model):
    name = optimizer.get("_name")
    searched = any(getattr(each, "param_group", None) == "architecture" for each in model.parameters())
    if searched and name not in ("architecture_adam", "composite"):
        logger.warning(
            "--optimizer %s trains the architecture as it trains the weights, from the first update and at their "
            "learning rate: --optimizer architecture_adam has --architecture-lr and --architecture-warmup-updates",
            name,
        )

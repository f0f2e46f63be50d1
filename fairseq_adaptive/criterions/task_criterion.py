"""The criterion of the task, within one that adds prices to its loss."""

import json
from dataclasses import dataclass, field
from typing import Dict, Optional

from fairseq.criterions import CRITERION_DATACLASS_REGISTRY, CRITERION_REGISTRY, FairseqCriterion, build_criterion
from fairseq.dataclass import FairseqDataclass
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.ranges import DROPOUT, PRICE, TEMPERATURE, check_ranges, ranged


@dataclass
class WrappingConfig(FairseqDataclass):
    """Of every criterion that has one of the task within."""

    task_criterion: str = field(
        default="cross_entropy", metadata={"help": "the criterion of the task, by the name that --criterion has for it"}
    )
    task_criterion_args: str = field(
        default="{}", metadata={"help": "its flags in JSON, such as '{\"label_smoothing\": 0.1}'"}
    )
    # flags of the criterion of the task, by the names that they have where it is --criterion
    label_smoothing: Optional[float] = ranged(
        None, DROPOUT, "epsilon for label smoothing of the criterion of the task (default: its own)"
    )
    report_accuracy: bool = field(default=False, metadata={"help": "let the criterion of the task report accuracy"})


@dataclass
class TaskCriterionConfig(WrappingConfig):
    report_mcc: bool = field(
        default=False, metadata={"help": "let the criterion of the task report Matthews' correlation"}
    )
    report_acc_and_f1: bool = field(
        default=False, metadata={"help": "let the criterion of the task report accuracy and F1"}
    )
    report_pearson_and_spearman: bool = field(
        default=False, metadata={"help": "let the criterion of the task report both correlations"}
    )
    # the stock task sentence_prediction reads these two from its criterion's flags
    classification_head_name: str = field(
        default="sentence_classification_head", metadata={"help": "name of the classification head to use"}
    )
    regression_target: bool = field(default=False, metadata={"help": "the labels are numbers"})


@dataclass
class DistillationConfig(TaskCriterionConfig):
    distill_from: Optional[str] = field(
        default=None, metadata={"help": "checkpoint of a trained model, such as the dense one, whose output to learn"}
    )
    distill_weight: float = ranged(1.0, PRICE, "weight of the divergence from that output")
    distill_temperature: float = ranged(1.0, TEMPERATURE, "temperature of both outputs in it")


def check_model(criterion, model) -> None:
    """Let a criterion refuse a model before training starts; those without a ``check_model`` take any.

    Raises:
        UsageError: when it cannot train that model
    """
    check = getattr(criterion, "check_model", None)
    if check is not None:
        check(model)


# flags that are refused where the criterion of the task has none of that name
PASSED = ("label_smoothing", "report_accuracy", "report_mcc", "report_acc_and_f1", "report_pearson_and_spearman")


def passed_flags(cfg, known, given) -> Dict:
    """The flags that are set for the criterion of the task, of :class:`TaskCriterionConfig`.

    Args:
        cfg: the flags
        known: names of those that the criterion of the task has
        given: what ``--task-criterion-args`` says

    Raises:
        UsageError: for one that it has not, and one that ``--task-criterion-args`` says otherwise
    """
    found = {name: getattr(cfg, name, None) for name in PASSED}
    found = {name: value for name, value in found.items() if value is not None and value is not False}
    for name, value in found.items():
        flag = f"--{name.replace('_', '-')}"
        if name not in known:
            raise UsageError(f"--task-criterion {cfg.task_criterion} has no {flag}: leave it out, or name another")
        if given.get(name, value) != value:
            raise UsageError(f"{flag} {value} and --task-criterion-args contradict each other: leave one of them out")
    return found


def build_task_criterion(cfg, task) -> FairseqCriterion:
    """Return the criterion that ``--task-criterion`` and ``--task-criterion-args`` name.

    Raises:
        UsageError: when there is none of that name, or it has no such flags
    """
    if cfg.task_criterion not in CRITERION_REGISTRY:
        raise UsageError(
            f"--task-criterion {cfg.task_criterion!r} is unknown: name one that --criterion takes, such "
            "as cross_entropy, masked_lm or sentence_prediction"
        )
    try:
        known = getattr(CRITERION_DATACLASS_REGISTRY.get(cfg.task_criterion), "__dataclass_fields__", {})
        shared = {name: cfg[name] for name in ("classification_head_name", "regression_target") if name in known}
        given = json.loads(cfg.task_criterion_args)
        shared.update(passed_flags(cfg, known, given))
        flags = OmegaConf.create({"_name": cfg.task_criterion, **shared, **given})
        config = CRITERION_DATACLASS_REGISTRY.get(cfg.task_criterion)
        if config is not None:
            check_ranges({name: each for name, each in flags.items() if isinstance(each, (int, float))}, config)
        if OmegaConf.is_config(cfg):  # criterions read some flags of the optimizer and of the program
            flags._set_parent(cfg._get_root())
        return build_criterion(flags, task)
    except UsageError:
        raise
    except AttributeError as error:  # a criterion asks its task for what others do not have
        raise UsageError(
            f"--task-criterion {cfg.task_criterion} does not fit this task ({error}): name one that does with "
            "--task-criterion, such as cross_entropy or label_smoothed_cross_entropy"
        ) from error
    except (OmegaConfBaseException, RecursionError, TypeError, ValueError) as error:
        raise UsageError(
            f"--task-criterion-args {cfg.task_criterion_args!r} does not fit {cfg.task_criterion}: "
            f"{' '.join(str(error).split())}"
        ) from error

"""Every flag of every criterion changes the loss or what is logged, now or at a later update, or it is said."""

import ast
import dataclasses
import functools
import logging

import pytest
import torch
from fairseq.criterions import CRITERION_REGISTRY
from fairseq.data import Dictionary
from fairseq.logging import metrics
from fairseq.models.roberta import RobertaModel
from fairseq.tasks.fairseq_task import StatefulContainer
from models.test_policy_flags import made
from old_checkpoints.cases import inputs, task
from omegaconf import OmegaConf

from fairseq_adaptive.criterions import distillation
from fairseq_adaptive.criterions.decisions import decisions
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.models.without_effect import check_criterion_flags
from fairseq_adaptive.report.flags import flags_of
from fairseq_adaptive.report.flags import ours as registered

UPDATES = 2
_LABELS = {"task_criterion": "sentence_prediction"}
# criterion: family, flags of the model, flags of the criterion
SETTINGS = {
    "adaptive_compute_loss": (
        "shared_transformer",
        {"halting": "act", "router": "skimming", "encoder_reader": "tape"},
        {},
    ),
    "adaptive_cross_entropy": ("par_transformer_xl", {"adaptive_softmax_cutoff": "10,20"}, {}),
    "architecture_entropy_loss": ("par_supernet", {}, {}),
    "early_exit_loss": ("shared_transformer", {}, {}),
    "fused_label_smoothed_cross_entropy": ("shared_transformer", {}, {}),
    "ponder_loss": ("shared_transformer", {"halting": "act"}, {}),
    "skim_loss": ("shared_transformer", {"router": "skimming"}, {"task_criterion": "cross_entropy"}),
    "tape_ponder_loss": ("adatape_parity", {}, {}),
}
VALUES = {
    "classification_head_name": "other",
    "compute": 0.4,
    "compute_measure": "time",
    "compute_weight": 2.0,
    "distill_from": "teacher.pt",
    "distill_temperature": 2.0,
    "distill_weight": 2.0,
    "entropy_warmup_updates": 8,
    "entropy_weight": 0.5,
    "exit_curriculum": "rotational",
    "exit_curriculum_updates": 8,
    "exit_every": 1,
    "exit_scale": 0.5,
    "exit_weights": "uniform",
    "ignore_prefix_size": 1,
    "kl_weight": 0.5,
    "label_smoothing": 0.1,
    "ponder_penalty": 0.5,
    "prices": '{"act": 0.5}',
    "prior_rate": 0.5,
    "skim_factor": 0.7,
    "skim_warmup_updates": 8,
    "target_args": '{"depth": {"gain": 3}}',
    "target_compute": 0.4,
    "target_depth": 1.2,
    "target_depth_rate": 0.3,
    "target_depth_weight": 0.7,
    "target_flops": 0.4,
    "target_flops_gain": 2.0,
    "target_flops_rate": 0.3,
    "target_tape": 1.0,
    "task_criterion": "label_smoothed_cross_entropy",
    "task_criterion_args": '{"label_smoothing": 0.1}',
    "time_penalty": 0.5,
    "time_penalty_warmup_updates": 8,
}
_WRAPPERS, _REPORTS = (
    ("adaptive_compute_loss", "ponder_loss", "skim_loss"),
    ("acc_and_f1", "mcc", "pearson_and_spearman"),
)
_SMOOTHED = {"task_criterion": "label_smoothed_cross_entropy"}
_DEPTH, _FLOPS, _TEACHER = {"target_depth": 1.2}, {"target_flops": 0.4}, {"distill_from": "teacher.pt"}
# what a flag needs: of the criterion, and of the model, in place of those of SETTINGS
CONTEXTS = {
    **{
        (loss, name): (_SMOOTHED, {})
        for loss in (*_WRAPPERS, "early_exit_loss")
        for name in ("label_smoothing", "report_accuracy", "task_criterion_args")
    },
    **{
        (loss, f"report_{name}"): (_LABELS, {"family": "transkimmer", "halting": "act"})
        for loss in _WRAPPERS
        for name in _REPORTS
    },
    **{
        (loss, name): (_LABELS, {"family": "transkimmer", "halting": "act"})
        for loss in _WRAPPERS
        for name in ("regression_target", "classification_head_name")
    },
    ("adaptive_compute_loss", "target_args"): (_DEPTH, {}),
    ("adaptive_compute_loss", "target_compute"): ({}, {"family": "par_supernet"}),
    **{
        ("tape_ponder_loss", name): ({}, {"family": "adatape"})
        for name in ("classification_head_name", "regression_target")
    },
    "exit_every": ({"exit_curriculum": "rotational"}, {}),
    "exit_curriculum_updates": ({"exit_curriculum": "gradual"}, {}),
    "target_depth_rate": (_DEPTH, {}),
    "target_depth_weight": (_DEPTH, {}),
    "kl_weight": ({}, {"family": "shared_transformer", "halting": "pondernet"}),
    "prior_rate": ({}, {"family": "shared_transformer", "halting": "pondernet"}),
    "entropy_warmup_updates": ({"entropy_weight": 0.5}, {}),
    "compute_weight": ({"target_compute": 0.4}, {}),
    "target_flops_gain": (_FLOPS, {}),
    "target_flops_rate": (_FLOPS, {}),
    "distill_weight": (_TEACHER, {}),
    "distill_temperature": (_TEACHER, {}),
}
# what is not said where it changes nothing, and why
SILENT = {
    "classification_head_name": "the task names the head that it registers by it",
    "regression_target": "the task sentence_prediction reads it",
}
FLAGS = [(loss, flag) for loss in SETTINGS for flag in flags_of(CRITERION_REGISTRY[loss])]


def _model(family, flags, classes=2):
    model = made(family, **flags)
    if isinstance(model, RobertaModel):
        for number, name in enumerate(("sentence_classification_head", "other")):
            torch.manual_seed(number)
            model.register_classification_head(name, num_classes=classes)
    torch.manual_seed(5)
    for name, each in model.named_parameters():
        each.data += 0.2 * torch.randn_like(each)
    return model


def _sample(family, classes):
    given = inputs("shared_transformer_lm" if family.startswith("par_") else family)
    torch.manual_seed(6)
    words = given.get("prev_output_tokens", given.get("src_tokens", given.get("elements")))
    if family in ("transkimmer", "adatape", "adatape_parity"):
        target = torch.tensor([0, 1, 1, 0][: len(words)]) * (classes - 1)
    else:
        target = torch.randint(4, 34, words.shape)
    return {
        "net_input": given,
        "target": target,
        "ntokens": words.numel(),
        "nsentences": len(words),
        "id": torch.arange(len(words)),
    }


def _criterion(loss, given):
    owner = CRITERION_REGISTRY[loss]
    usual = {
        each.name: each.default
        for each in dataclasses.fields(getattr(owner, "__dataclass"))
        if each.default is not dataclasses.MISSING and not str(each.default).startswith("${")
    }
    words, labels = task(), Dictionary()
    for label in "01":
        labels.add_symbol(label)
    words.label_dictionary, words.state = labels, StatefulContainer()
    root = {
        "criterion": {**usual, "_name": loss, "sentence_avg": False, **given},
        "optimization": {"sentence_avg": False},
    }
    return owner.build_criterion(OmegaConf.create({**root, "common": {"tpu": False}}).criterion, words)


def _setting(loss, context):
    family, of_model, of_loss = SETTINGS[loss]
    given, others = context
    others = dict(others)
    other = others.pop("family", family)
    of_model = {**of_model, **others} if other == family else others
    return other, of_model, {**of_loss, **given}


def followed(loss, context, classes, **flags):
    """The losses of some updates and of an evaluation, and what is logged."""
    family, of_model, given = _setting(loss, context)
    model, sample, found = _model(family, of_model, classes), _sample(family, classes), []
    criterion = _criterion(loss, {**given, **flags})
    if hasattr(criterion, "check_model"):
        criterion.check_model(model)
    for update in range(UPDATES + 1):
        model.set_num_updates(update)
        training = update < UPDATES
        model.train(training), criterion.train(training)
        torch.manual_seed(7)
        with torch.set_grad_enabled(training):
            value, _, log = criterion(model, sample)
        found.append(float(value))
        with metrics.aggregate(new_root=True) as meters:
            type(criterion).reduce_metrics([log])
        found.append({name: str(each) for name, each in meters.get_smoothed_values().items()})
    # what is logged is rounded: times may look like FLOPs
    return [*found, [each.tolist() for name, each in model.named_buffers() if name.endswith("block_costs")]]


@pytest.fixture
def said(caplog):
    def said(loss, context, **flags):
        family, of_model, given = _setting(loss, context)
        policies = [each.policy for each in decisions(made(family, **of_model))]
        caplog.clear()
        with caplog.at_level(logging.WARNING, "fairseq_adaptive.models.without_effect"):
            check_criterion_flags({**given, **flags}, CRITERION_REGISTRY[loss], policies)
        return caplog.text

    return said


@functools.lru_cache(None)
def _known(loss, context, classes):
    return followed(loss, ast.literal_eval(context), classes)


def _plain(loss, context, classes):
    return _known(loss, repr(context), classes)


def _entry(table, loss, name, default=None):
    return table.get((loss, name), table.get(name, default))


@pytest.mark.parametrize("loss, flag", FLAGS, ids=[f"{loss}-{flag.dest}" for loss, flag in FLAGS])
def test_flag(loss, flag, said, monkeypatch):
    monkeypatch.setattr(distillation, "_load", lambda path, task: _model(*_setting(loss, context)[:2]))
    value = True if flag.takes == "switch" else _entry(VALUES, loss, flag.dest)
    assert value is not None, f"{flag.name} is new: write another value of it to VALUES"
    classes = 1 if flag.dest == "regression_target" else 2
    given, context = {flag.dest: value}, _entry(CONTEXTS, loss, flag.dest)
    if context is not None and flag.dest not in SILENT:
        try:
            alone = followed(loss, ({}, {}), classes, **given)
            assert alone == _plain(loss, ({}, {}), classes), "it needs nothing: correct the table"
            assert f"{flag.name} without " in said(loss, ({}, {}), **given)
        except UsageError:
            pass
    context = context or ({}, {})
    assert f"{flag.name} without " not in said(loss, context, **given)
    assert followed(loss, context, classes, **given) != _plain(loss, context, classes), f"{flag.name} changes nothing"


def test_settings_have_all_criterions():
    ours = {name for kind, name, owner in registered() if kind == "criterion" and flags_of(owner)}
    assert ours == set(SETTINGS)
    known = {*((loss, flag.dest) for loss, flag in FLAGS), *(flag.dest for _, flag in FLAGS)}
    assert {*VALUES, *CONTEXTS, *SILENT} <= known


@pytest.mark.parametrize("loss", SETTINGS)
def test_same_flags_give_the_same(loss):
    assert followed(loss, ({}, {}), 2) == _plain(loss, ({}, {}), 2)

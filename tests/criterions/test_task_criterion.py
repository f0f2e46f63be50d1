"""Flags of the criterion that a loss with prices wraps."""

import argparse

import pytest
from fairseq.logging import metrics
from families import FAMILIES, Family, build_trainer, train, write_data
from omegaconf import OmegaConf

from fairseq_adaptive.criterions.task_criterion import PASSED, passed_flags
from fairseq_adaptive.errors import UsageError

TRANSLATION = FAMILIES["universal_transformer"].flags.split("--halting")[0]
LABELS = FAMILIES["transkimmer"].flags.split("--criterion")[0] + "--batch-size 48"
LOSSES = {
    "ponder_loss": (TRANSLATION + " --halting act", "pairs"),
    "adaptive_compute_loss": (TRANSLATION + " --halting act", "pairs"),
    "skim_loss": (LABELS, "labels"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("families"))


def criterion_of(data, monkeypatch, loss, *flags, kind=None):
    common, folder = LOSSES[kind or loss]
    monkeypatch.setitem(FAMILIES, "wrapped", Family(folder, f"{common} --criterion {loss}"))
    return build_trainer("wrapped", data, *flags)[0].criterion


@pytest.mark.parametrize("loss", ("ponder_loss", "adaptive_compute_loss"))
def test_smoothing(data, monkeypatch, loss):
    flags = "--task-criterion label_smoothed_cross_entropy --report-accuracy --label-smoothing 0.2".split()
    inner = criterion_of(data, monkeypatch, loss, *flags).task_criterion
    assert inner.eps == 0.2 and inner.report_accuracy


def test_flags_that_do_not_fit():
    cfg, known = argparse.Namespace(task_criterion="x", label_smoothing=0.2, report_mcc=True), PASSED
    assert passed_flags(cfg, known, {}) == {"label_smoothing": 0.2, "report_mcc": True}
    assert passed_flags(cfg, known, {"label_smoothing": 0.2, "more": 1}) == passed_flags(cfg, known, {})
    with pytest.raises(UsageError, match="--label-smoothing 0.2 and --task-criterion-args contradict each other"):
        passed_flags(cfg, known, {"label_smoothing": 0.1})
    with pytest.raises(UsageError, match="--task-criterion x has no --label-smoothing"):
        passed_flags(cfg, PASSED[1:], {})


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    """The same with labels 1 and 0, which reports need."""
    folder = write_data(tmp_path_factory.mktemp("numbers"))
    dictionary = folder / "labels" / "label" / "dict.txt"
    dictionary.write_text(dictionary.read_text().replace("good", "1").replace("bad", "0"))
    return folder


CLASSIFICATION = {
    "sentence_prediction": ("", "accuracy"),
    "skim_loss": ("", "accuracy"),
    "adaptive_compute_loss": ("--task-criterion sentence_prediction", "accuracy"),
}


@pytest.mark.parametrize("criterion", CLASSIFICATION)
def test_reports_after_another_training_of_the_process(numbers, monkeypatch, criterion):
    """Trainings of a process share no meters: the first derives what the second logs as a number, and logs a loss."""
    flags = "--task-criterion label_smoothed_cross_entropy --label-smoothing 0.2 --report-accuracy".split()
    monkeypatch.setitem(FAMILIES, "before", Family("pairs", f"{TRANSLATION} --halting act --criterion ponder_loss"))
    train(*build_trainer("before", numbers, *flags), 1)
    assert metrics.get_smoothed_values("train")["ponder_loss"] > 0
    more, accuracy = CLASSIFICATION[criterion]
    monkeypatch.setitem(FAMILIES, "reporting", Family("labels", f"{LABELS} --criterion {criterion} {more}"))
    trainer, batches = build_trainer("reporting", numbers, "--report-mcc", "--report-acc-and-f1")
    batches = list(batches)
    logged = train(trainer, batches, 2)
    assert all(accuracy in each for each in logged) and "mcc" not in logged[0]
    trained = metrics.get_smoothed_values("train")
    assert "ponder_loss" not in trained and trained["num_updates"] == 2
    with metrics.aggregate(new_root=True) as log:
        trainer.valid_step(batches[0])
    assert {"mcc", "f1", "acc_and_f1", accuracy} <= set(log.get_smoothed_values())


@pytest.mark.parametrize("criterion", CLASSIFICATION)
def test_reports_of_labels_that_are_texts(data, monkeypatch, criterion):
    """fairseq ended in ``int('bad')`` in the first validation."""
    monkeypatch.setitem(
        FAMILIES, "reporting", Family("labels", f"{LABELS} --criterion {criterion} {CLASSIFICATION[criterion][0]}")
    )
    with pytest.raises(UsageError, match="--report-mcc needs labels that are numbers, .* here they are (good|bad)"):
        build_trainer("reporting", data, "--report-mcc")


def test_reports_of_classification(numbers, monkeypatch):
    inner = criterion_of(numbers, monkeypatch, "skim_loss", "--report-mcc", "--report-acc-and-f1").task_criterion
    assert [name for name in PASSED[2:] if getattr(inner, name)] == ["report_mcc", "report_acc_and_f1"]


def test_skimming_in_translation(data, monkeypatch):
    """skim_loss has the criterion of classification for its default: it says which to name."""
    monkeypatch.setitem(LOSSES, "translation", (TRANSLATION + " --router skimming", "pairs"))
    with pytest.raises(UsageError, match="sentence_prediction does not fit this task .* label_smoothed_cross_entropy"):
        criterion_of(data, monkeypatch, "skim_loss", kind="translation")
    flags = "--task-criterion label_smoothed_cross_entropy --label-smoothing 0.1".split()
    assert criterion_of(data, monkeypatch, "skim_loss", *flags, kind="translation").task_criterion.eps == 0.1


def test_checkpoints_that_are_older_than_the_flags():
    assert passed_flags(argparse.Namespace(task_criterion="cross_entropy"), (), {}) == {}
    cfg = OmegaConf.create({"task_criterion": "x", "label_smoothing": None, "report_mcc": False})
    assert passed_flags(cfg, (), {"label_smoothing": 0.1}) == {}

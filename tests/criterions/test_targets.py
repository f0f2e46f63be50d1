"""Targets are reached within the updates there are, missed ones are said, and the best checkpoint keeps to them."""

import argparse
import json
import logging
from types import SimpleNamespace

import pytest
import torch
from fairseq.logging import metrics
from fairseq.tasks.fairseq_task import StatefulContainer
from omegaconf import OmegaConf

from fairseq_adaptive.compat.targets import _told, updates_of
from fairseq_adaptive.criterions.adaptive_compute_loss import AdaptiveComputeLoss
from fairseq_adaptive.criterions.controller import TARGETS, Controller
from fairseq_adaptive.criterions.distillation import without_teacher
from fairseq_adaptive.criterions.on_target import Wanted, log_on_target
from fairseq_adaptive.criterions.skim_loss import SkimLoss, SkimLossConfig
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules import recording
from fairseq_adaptive.modules.policies import Skimming
from fairseq_adaptive.modules.stack.compute import stack_macs

TINY = {
    "encoder_embed_dim": 16,
    "encoder_ffn_embed_dim": 32,
    "encoder_attention_heads": 2,
    "encoder_layers": 3,
    "dropout": 0.1,
    "max_positions": 32,
    "dtype": torch.float32,
}
STACK = "encoder.sentence_encoder.layers"


def criterion_of(dictionary, checkpoint=None, **flags):
    task = argparse.Namespace(target_dictionary=dictionary, label_dictionary=dictionary, state=StatefulContainer())
    cfg = {"common": {"tpu": False}, "optimization": {"sentence_avg": False}, "checkpoint": checkpoint or {}}
    cfg = OmegaConf.create({**cfg, "criterion": {"_name": "skim_loss", **vars(SkimLossConfig(**flags))}})
    return SkimLoss.build_criterion(cfg.criterion, task)


def batch():
    tokens = torch.randint(4, 44, (8, 12))
    sample = {"net_input": {"src_tokens": tokens}, "target": torch.randint(2, (8, 1))}
    return {**sample, "ntokens": tokens.numel(), "nsentences": 8}


def transkimmer(build):
    model = build("transkimmer_base", **TINY).train()
    model.register_classification_head("sentence_classification_head", num_classes=2)
    return model


def test_a_published_start_reaches_the_target_within_60_updates(build, dictionary, caplog):
    """Biases of 5 and a learning rate of 2e-5, with which no price moves the scores that far."""
    torch.manual_seed(3)
    model, criterion = transkimmer(build), criterion_of(dictionary, target_flops=0.5)
    criterion.prepare_targets(60)
    optimizer, shares, evaluated = torch.optim.Adam(model.parameters(), lr=2e-5), [], []
    for update in range(60):
        model.set_num_updates(update), optimizer.zero_grad()
        loss, _, log = criterion(model, batch())
        loss.backward(), optimizer.step()
        shares.append(float(log["skim_spent"] / log["skim_dense"]))
        if update % 15 == 14:
            model.eval(), criterion.eval()
            with torch.no_grad():
                logs = [criterion(model, batch())[2] for _ in range(20)]
                with metrics.aggregate(new_root=True):
                    criterion.reduce_metrics(logs)
            evaluated.append(float(sum(log["skim_spent"] for log in logs) / sum(log["skim_dense"] for log in logs)))
            model.train(), criterion.train()
    assert shares[0] > 1.0  # all tokens, and predictors
    assert evaluated[-1] == pytest.approx(0.5, abs=0.05)
    router = model.encoder.sentence_encoder.layers.router
    assert -12 < float(router.shift) < -8

    model.eval()
    with torch.no_grad(), recording(model) as traces:
        model(**batch()["net_input"])
    spent, dense = stack_macs(model.encoder.sentence_encoder.layers, traces[STACK][0])
    assert float(spent / dense) < 0.6
    again = build("transkimmer_base", seed=7, **TINY)
    again.register_classification_head("sentence_classification_head", num_classes=2)
    again.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(again.encoder.sentence_encoder.layers.router.shift, router.shift)
    old = Skimming(16, 3).state_dict()
    assert not any("shift" in name for name in old)  # as today's checkpoints
    router.load_state_dict(old)
    assert router.shift is None
    with caplog.at_level(logging.WARNING):
        criterion.controllers["router"].state["evaluated"] = [2.0, 4.0]
        criterion.report_targets(60)
    assert not [record for record in caplog.records if "was missed" in record.getMessage()]


def test_the_rate_grows_where_there_are_few_updates():
    controller = Controller(argparse.Namespace(state=StatefulContainer()), TARGETS["flops"], 0.5)
    assert controller.pace == 0.01 and controller.band(3, 1.0) is None
    assert controller.band(0, 1.0, alone=True) == (0.5, 1.0) and controller.band(500, 1.0, alone=True) == (0.5, 0.5)
    controller.horizon = 100
    assert controller.pace == pytest.approx(0.1)
    assert [controller.band(update, 1.0)[1] for update in (0, 25, 50, 99)] == [1.0, 0.75, 0.5, 0.5]
    controller.horizon = 10**6
    assert controller.pace == 0.01
    controller.rate = 0.3
    assert controller.pace == 0.3


def test_training_is_steered_by_what_evaluation_spends():
    controller = Controller(argparse.Namespace(state=StatefulContainer()), TARGETS["flops"], 0.5)
    controller.horizon = 4
    for update in range(2):
        controller.advance(update)
        controller.count(torch.tensor(50.0), torch.tensor(100.0))
    controller.watch(30.0, 50.0), controller.watch(10.0, 50.0)
    saved = json.loads(json.dumps(controller.task.state.state_dict))  # a checkpoint is written after an evaluation
    controller.task.state.merge_state_dict(saved)
    controller.advance(2)
    assert controller.gap == pytest.approx(0.1)
    controller.count(torch.tensor(60.0), torch.tensor(100.0))
    controller.advance(3)
    assert controller.state["excess"] == pytest.approx(0.0)


@pytest.mark.parametrize("name", TARGETS)
def test_a_missed_target_is_said_with_what_to_change(name):
    controller = Controller(argparse.Namespace(state=StatefulContainer()), TARGETS[name], 1.0)
    for share, said in ((1.02, False), (0.98, False), (1.05, True), (0.9, True)):
        controller.state["evaluated"] = [share, 1.0]
        text = controller.missed(7)
        assert (text is not None) == said
        if said:
            assert f"{TARGETS[name].flag} 1 was missed: it is {share:.3f} after 7 updates" in text
            assert "Train for more updates" in text and (TARGETS[name].advice in text) == (share > 1)
    bound = Controller(None, TARGETS[name], 1.0, steers=False)
    bound.watch(0.5, 1.0)
    assert bound.missed(7) is None
    bound.forget(), bound.watch(1.5, 1.0)
    assert "was missed" in bound.missed(7)


@pytest.mark.parametrize(
    "max_update, max_epoch, frequency, expected",
    ((0, 0, [1], None), (50, 0, [1], 50), (0, 3, [1, 2], 10 + 5 + 5), (7, 3, [4], 7)),
)
def test_updates_of_a_training(max_update, max_epoch, frequency, expected):
    flags = {"max_update": max_update, "max_epoch": max_epoch, "update_freq": frequency}
    assert updates_of(OmegaConf.create({"optimization": flags}), 10) == expected


@pytest.mark.parametrize("epoch, stops, reported", ((1, False, False), (2, False, True), (1, True, True)))
def test_a_training_tells_its_criterion_how_long_it_is_and_when_it_ends(epoch, stops, reported):
    class Told(torch.nn.Module):
        heard = ()

        def prepare_targets(self, updates):
            self.heard = (updates,)

        def report_targets(self, updates):
            self.heard += (updates,)

    class Epochs(list):
        pass

    criterion, epochs = torch.nn.Sequential(Told()), Epochs([0] * 10)
    epochs.epoch = epoch
    trainer = SimpleNamespace(_criterion=criterion, get_num_updates=lambda: 13)
    cfg = OmegaConf.create({"optimization": {"max_update": 0, "max_epoch": 2, "update_freq": [1]}})
    assert _told(lambda *given: ([1.0], stops))(cfg, trainer, None, epochs) == ([1.0], stops)
    assert criterion[0].heard == ((20, 13) if reported else (20,))


def best(asked, *checkpoints):
    """Which of checkpoints, each of quality and share of FLOPs, fairseq would keep."""
    values = []
    for quality, share in checkpoints:
        with metrics.aggregate(new_root=True) as found:
            metrics.log_scalar(asked.quality, quality, 1)
            log_on_target(asked, {"flops": 0.5}, {"flops_spent": share * 7, "flops_of": 7}, True)
        values.append(found.get_smoothed_values()[f"{asked.quality}_on_target"])
    return values.index((max if asked.maximize else min)(values)), values


def test_the_best_checkpoint_is_among_those_that_keep_to_the_target():
    place, values = best(Wanted("accuracy", True), (90.0, 1.08), (80.0, 0.51), (70.0, 0.3), (85.0, 0.52))
    assert place == 1 and values[1:3] == [80.0, 70.0]
    assert best(Wanted("loss", False), (0.1, 1.0), (0.9, 0.514), (0.8, 0.5))[0] == 2
    assert best(Wanted("loss", False), (0.1, 1.0), (0.9, 0.7))[0] == 1  # none does: the one that is nearest


def test_a_value_that_nobody_logs_and_a_metric_without_a_target_are_refused(dictionary):
    with metrics.aggregate(new_root=True) as found:
        metrics.log_scalar("loss", 1.0, 1)
        log_on_target(Wanted("f2", True), {"flops": 0.5}, {}, True)
    with pytest.raises(UsageError, match="nothing logs 'f2' in an evaluation: name one of loss_on_target"):
        found.get_smoothed_values()
    flags = {"best_checkpoint_metric": "accuracy_on_target", "maximize_best_checkpoint_metric": True}
    with pytest.raises(UsageError, match="accuracy_on_target needs a target, such as --target-flops 0.5"):
        criterion_of(dictionary, flags)
    assert criterion_of(dictionary, flags, target_flops=0.5).wanted == Wanted("accuracy", True)
    assert AdaptiveComputeLoss.wanted is None and AdaptiveComputeLoss.targets == {}


def test_a_model_is_measured_without_its_teacher():
    assert without_teacher(OmegaConf.create({"distill_from": "x.pt", "skim_factor": 1})).distill_from is None
    assert "distill_from" not in without_teacher(OmegaConf.create({"label_smoothing": 0.1}))

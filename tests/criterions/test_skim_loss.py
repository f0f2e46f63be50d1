"""The price of kept tokens: values by hand, the controller, distillation, errors."""

import argparse

import pytest
import torch
import torch.nn.functional as F
from fairseq.logging import metrics
from fairseq.tasks.fairseq_task import StatefulContainer
from omegaconf import OmegaConf

from fairseq_adaptive.criterions import distillation
from fairseq_adaptive.criterions.skim_loss import SkimLoss, SkimLossConfig
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules import recording

TINY = {
    "encoder_embed_dim": 16,
    "encoder_ffn_embed_dim": 32,
    "encoder_attention_heads": 2,
    "encoder_layers": 3,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "max_positions": 32,
    "dtype": torch.float32,
}
STACK = "encoder.sentence_encoder.layers"


def criterion_of(dictionary, **flags):
    task = argparse.Namespace(target_dictionary=dictionary, label_dictionary=dictionary, state=StatefulContainer())
    cfg = SkimLossConfig(**flags)
    cfg = OmegaConf.create({"common": {"tpu": False}, "optimization": {"sentence_avg": False}, "criterion": cfg})
    return SkimLoss.build_criterion(cfg.criterion, task)


def transkimmer(build, eager=True, **flags):
    model = build("transkimmer_base", **{**TINY, **flags}).train()
    model.register_classification_head("sentence_classification_head", num_classes=2)
    if eager and not flags.get("no_skimming"):
        for predictor in model.encoder.sentence_encoder.layers.router:
            torch.nn.init.normal_(predictor[4].weight)
            torch.nn.init.zeros_(predictor[4].bias)
    return model


@pytest.fixture
def sample():
    torch.manual_seed(3)
    tokens = torch.randint(4, 44, (4, 9))
    tokens[1, 6:] = tokens[3, 4:] = 1
    return {
        "net_input": {"src_tokens": tokens},
        "target": torch.tensor([[0], [1], [1], [0]]),
        "ntokens": int((tokens != 1).sum()),
        "nsentences": 4,
    }


def test_price_and_counts_by_hand(build, dictionary, sample):
    model, criterion = transkimmer(build), criterion_of(dictionary, skim_factor=0.3)
    tokens = sample["net_input"]["src_tokens"]
    torch.manual_seed(1)
    with recording(model) as traces:
        plain, size, _ = criterion.task_criterion(model, sample)
    trace, total = traces[STACK][0], sample["ntokens"]
    kept = [step.kept[tokens != 1].sum().item() for step in trace.steps]
    torch.manual_seed(1)
    loss, _, log = criterion(model, sample)
    assert loss.item() == pytest.approx(plain.item() + 0.3 * sum(kept) / 3 / total * size, abs=1e-5)
    assert [float(log[f"skim_kept_{depth}"]) for depth in (1, 2, 3)] == kept
    assert float(log["loss"]) == pytest.approx(plain.item())
    loss.backward()
    assert all(each[4].weight.grad.abs().sum() > 0 for each in model.encoder.sentence_encoder.layers.router)

    # multiply-adds, sentence by sentence and token by token, and predictors on what comes to a layer
    model.eval(), criterion.eval()
    with torch.no_grad(), recording(model) as traces:
        model(tokens)
    with torch.no_grad():
        log = criterion(model, sample)[2]
    spent = 0
    for row in range(4):
        count = int((tokens[row] != 1).sum())
        for step in traces[STACK][0].steps:
            spent += count * (16 * 16 + 16 * 2)
            count = int(step.alive[row].sum())
            spent += count * (4 * 16 * 16 + 2 * 16 * 32) + 2 * count * count * 16
    dense = sum(3 * (n * 2048 + 32 * n * n) for n in (9, 6, 9, 4))
    assert float(log["skim_spent"]) == spent < dense == float(log["skim_dense"])
    with metrics.aggregate() as logged:
        criterion.reduce_metrics([log, log])
    values = logged.get_smoothed_values()
    assert values["flops_speedup"] == pytest.approx(dense / spent, abs=0.01)
    assert values["kept"] == pytest.approx(sum(float(log[f"skim_kept_{d}"]) for d in (1, 2, 3)) / 3 / total, abs=1e-4)
    assert values["kept_3"] <= values["kept_1"] and "accuracy" in values


def test_padding_costs_nothing(build, dictionary, sample):
    model, criterion = transkimmer(build).eval(), criterion_of(dictionary, skim_factor=5.0)
    wide = {**sample, "net_input": {"src_tokens": F.pad(sample["net_input"]["src_tokens"], (0, 6), value=1)}}
    (loss, _, log), (wider, _, more) = (criterion(model, each) for each in (sample, wide))
    torch.testing.assert_close(loss, wider)
    assert log["skim_spent"] == more["skim_spent"] and log["skim_dense"] == more["skim_dense"]


def test_factor_warms_up(build, dictionary, sample):
    model, criterion = transkimmer(build), criterion_of(dictionary, skim_factor=0.4, skim_warmup_updates=10)
    for update, expected in ((0, 0.0), (5, 0.2), (20, 0.4)):
        model.set_num_updates(update)
        assert criterion(model, sample)[2]["skim_factor"] == pytest.approx(4 * expected)


def test_target_falls(build, dictionary, sample):
    """What is above the target of an update raises the price of the next one: 1 at first, 0.4 after ten updates."""
    model, excesses = transkimmer(build), []
    criterion = criterion_of(dictionary, target_flops=0.4, skim_warmup_updates=10)
    for update in range(13):
        model.set_num_updates(update)
        torch.manual_seed(1)
        log = criterion(model, sample)[2]
        share = float(log["skim_spent"] / log["skim_dense"])
        excesses.append(criterion.controllers["router"].state["excess"] - share)
    targets = [1 - 0.6 * min(update, 10) / 10 for update in range(13)]
    assert excesses[1:] == pytest.approx([-target for target in targets[1:]], abs=1e-6)


@pytest.mark.parametrize("target", (0.4, 0.7))
def test_controller_reaches_the_share_of_flops_that_is_asked_for(build, dictionary, target):
    """Of a model that learns to tell which of two words is there, in which all else may go."""
    model = transkimmer(build, eager=False)
    for predictor in model.encoder.sentence_encoder.layers.router:
        predictor[4].bias.data.copy_(torch.tensor([-1.0, 1.0]))  # published starts take thousands of updates
    criterion = criterion_of(dictionary, target_flops=target, target_flops_gain=2.0, target_flops_rate=0.05)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    torch.manual_seed(7)
    spent = dense = 0.0
    for update in range(200):
        tokens = torch.randint(4, 44, (8, 12))
        tokens[:, 0] = 0
        label = torch.randint(2, (8, 1))
        tokens[torch.arange(8), torch.randint(1, 12, (8,))] = label[:, 0] + 44
        sample = {"net_input": {"src_tokens": tokens}, "target": label, "ntokens": tokens.numel(), "nsentences": 8}
        model.set_num_updates(update)
        optimizer.zero_grad()
        loss, size, log = criterion(model, sample)
        (loss / size).backward()
        optimizer.step()
        if update >= 100:  # a single batch says little
            spent, dense = spent + float(log["skim_spent"]), dense + float(log["skim_dense"])
    assert spent / dense == pytest.approx(target, abs=0.1)


def test_learns_from_a_teacher(build, dictionary, sample, monkeypatch):
    teacher, model = transkimmer(build, no_skimming=True), transkimmer(build, seed=2)
    monkeypatch.setattr(distillation, "_load", lambda path, task: teacher)
    criterion = criterion_of(
        dictionary, skim_factor=0.0, distill_from="x.pt", distill_weight=2.0, distill_temperature=3.0
    )
    model.eval()
    logits, taught = (
        each(**sample["net_input"], classification_head_name="sentence_classification_head")[0]
        for each in (model, teacher)
    )
    gap = F.log_softmax(taught / 3, -1) - F.log_softmax(logits / 3, -1)
    distance = (F.softmax(taught / 3, -1) * gap).sum(1).mean()
    loss, size, log = criterion(model, sample)
    torch.testing.assert_close(loss, log["loss"] + 2 * 9 * distance * size)
    loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not list(criterion.parameters())


def test_masked_words_and_numbers(build, dictionary, sample):
    model = transkimmer(build)
    target = torch.full_like(sample["net_input"]["src_tokens"], 1)
    target[0, 2] = 11
    assert criterion_of(dictionary, task_criterion="masked_lm")(model, {**sample, "target": target})[0].isfinite()
    model.register_classification_head("number", num_classes=1)
    criterion = criterion_of(dictionary, regression_target=True, classification_head_name="number")
    loss = criterion(model, {**sample, "target": torch.rand(4, 1)})[0]
    assert loss.isfinite() and criterion.task_criterion.regression_target


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"target_flops": 0.0}, "--target-flops is 0.0"),
        ({"skim_factor": -1.0}, "--skim-factor is -1.0"),
        ({"task_criterion": "skim_loss"}, "no criterion of a task"),
        ({"task_criterion": "nothing"}, "'nothing' is unknown"),
        ({"task_criterion_args": '{"nothing": 1}'}, "does not fit sentence_prediction"),
    ],
)
def test_refuses(dictionary, flags, message):
    with pytest.raises(UsageError, match=message):
        criterion_of(dictionary, **flags)


def test_needs_a_model_that_skims(build, dictionary, sample):
    with pytest.raises(UsageError, match="needs a model that skims"):
        criterion_of(dictionary)(transkimmer(build, no_skimming=True), sample)

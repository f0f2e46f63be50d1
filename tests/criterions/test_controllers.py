"""Prices that are steered: several controllers at once, targets of every kind, and what is refused."""

import argparse
import json

import pytest
import torch
from torch import nn

from fairseq_adaptive.criterions.architecture_entropy_loss import ArchitectureEntropyLoss, ArchitectureEntropyLossConfig
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules import recording
from criterions.compute_losses import ALBERT, BOTH, HEAD, LM, TAPE, agree, criterion_of, logged, stir


def test_two_controllers_at_once(build, dictionary, masked):
    """One step of each an update over its micro-batches, which have one price; a resumed training goes on exactly."""
    model = stir(build("albert_act_tiny", **ALBERT, **BOTH))
    flags = {
        "task_criterion": "masked_lm",
        "target_depth": 1.5,
        "target_flops": 0.9,
        "target_args": {"depth": {"rate": 0.1}, "flops": {"gain": 2.0, "rate": 0.05}},
    }
    other = {
        **masked,
        "net_input": {"src_tokens": masked["net_input"]["src_tokens"][:2]},
        "target": masked["target"][:2],
    }
    criterion, counted = criterion_of(dictionary, **flags), []
    for update in range(3):
        model.set_num_updates(update)
        weights = []
        for sample in (masked, other):  # --update-freq 2
            log = criterion(model, sample)[2]
            size = float(log["sample_size"])
            weights.append([float(log[f"adaptive_sum_{name}_weight"]) / size for name in ("act", "skimming")])
            counted.append(
                [
                    float(log[f"adaptive_{part}_{name}"])
                    for name in ("act_depth", "skimming_flops")
                    for part in ("sum", "of")
                ]
            )
        assert weights[0] == pytest.approx(weights[1], rel=1e-6) and (update == 0) == (weights[0] == [0, 0])
    depths, tokens, spent, dense = torch.tensor(counted[:2]).double().sum(0).tolist()
    excess = depths / tokens / 1.5 - 1, spent / dense - 0.9
    ponder, skimming = criterion.task.state.ponder, criterion.task.state.skimming
    assert (ponder["excess"], skimming["excess"]) == pytest.approx(excess)
    assert (ponder["sum"], skimming["sum"]) == pytest.approx((2 * 0.1 * excess[0], 2 * 0.05 * excess[1]))
    assert weights[0] == pytest.approx([0.1 * (excess[0] + ponder["sum"]), 2 * excess[1] + skimming["sum"]])
    assert ponder is not skimming and excess[0] * excess[1] < 0  # they pull in different directions

    saved = json.loads(json.dumps(criterion.task.state.state_dict))
    resumed = criterion_of(dictionary, saved, **flags)
    fresh = criterion_of(dictionary, **flags)
    model.set_num_updates(3)
    losses = [each(model, masked)[0] for each in (criterion, resumed, fresh)]
    assert torch.equal(losses[0], losses[1]) and not torch.equal(losses[0], losses[2])


@pytest.mark.parametrize("width", (8, 400))
def test_flops_of_a_tape_that_joins_later(build, dictionary, width):
    """By hand: predictors, which are asked of who is there; reading; and the tape's tokens in the layers that come, in
    which they have a feed-forward of their own. Where all are kept the share that is kept is 1."""
    flags = {**TAPE, "tape_ffn_embed_dim": width}
    model = build("adatape", router="skimming", router_args='{"bias": 20}', tape_layer=2, **flags)
    model.register_classification_head(HEAD, num_classes=2)
    sample = {
        "net_input": {"src_tokens": torch.randint(4, 44, (5, 9))},
        "target": torch.tensor([0, 1, 1, 0, 1]),
        "ntokens": 45,
        "nsentences": 5,
    }
    criterion = criterion_of(dictionary, task_criterion="sentence_prediction")
    log = criterion(model.double().train(), sample)[2]
    with recording(model) as traces:
        model(**sample["net_input"], features_only=True)
    ((trace,),), reader, dim, key_dim, mlp = traces.values(), model.encoder.sentence_encoder.tape.reader, 16, 8, 8
    each = reader.entries_per_token
    predictors = reading = layers = 0
    for tape in trace.reading.live.sum(1).tolist():
        predictors += (4 * 9 + 2 * tape) * (dim * dim + 2 * dim)
        reading += tape * ((40 + each) * key_dim + each * dim + 3 * dim * mlp)
        layers += 2 * (tape * (4 * dim * dim + 3 * dim * width) + 2 * dim * ((9 + tape) ** 2 - 81))
    spent, dense = (float(log[f"adaptive_{part}_skimming_flops"]) for part in ("sum", "of"))
    assert dense == 5 * 4 * (9 * (4 * dim * dim + 2 * dim * 24) + 2 * dim * 81)
    assert spent - dense == predictors + reading + layers
    assert model.encoder.sentence_encoder.layers.router.price(trace) == 1
    values = logged(criterion, log)
    assert values["skimming_kept"] == values["skimming_kept_1"] == values["skimming_kept_4"] == 1
    assert values["tape_flops"] == values["skimming_flops"] > 1


def test_a_target_steers_the_tape(build, dictionary):
    """Below the target reading is rewarded, above it is priced."""
    model = build("adatape", **TAPE)
    model.register_classification_head(HEAD, num_classes=2)
    sample = {
        "net_input": {"src_tokens": torch.randint(4, 44, (5, 9))},
        "target": torch.tensor([0, 1, 1, 0, 1]),
        "ntokens": 45,
        "nsentences": 5,
    }
    nn.init.constant_(model.encoder.sentence_encoder.tape.reader.norm.weight, 2.0)  # certain: the tape is not full
    length = (
        float(
            criterion_of(dictionary, task_criterion="sentence_prediction")(model.double().train(), sample)[2][
                "adaptive_sum_tape_length"
            ]
        )
        / 5
    )
    for target in (length / 2, length * 1.1):
        criterion = criterion_of(dictionary, task_criterion="sentence_prediction", target_tape=target)
        for update in range(2):
            model.set_num_updates(update)
            loss, _, log = criterion(model, sample)
        assert log["adaptive_sum_tape_weight"] / 5 == pytest.approx(0.1 * 1.01 * (length / target - 1))
        price = log["adaptive_sum_tape_price"].double()
        torch.testing.assert_close(loss.double() - log["loss"], price, rtol=1e-4, atol=1e-5)


def test_a_supernet(build, dictionary, task, segments):
    model = build(
        "par_supernet",
        blocks=4,
        dropout=0.0,
        temperature_updates=100,
        memory_length=8,
        **{name: value for name, value in LM.items() if "layers" not in name and name != "dropout"},
    )
    sample = {**segments, "net_input": {"src_tokens": segments["net_input"]["src_tokens"]}}
    with torch.no_grad():
        model.decoder.architecture.copy_(torch.eye(3)[[0, 1, 2, 0]])
    cfg = ArchitectureEntropyLossConfig(sentence_avg=False, entropy_weight=0.3)
    expected, _, old = ArchitectureEntropyLoss(task, argparse.Namespace(**vars(cfg)))(model.train(), sample)
    torch.manual_seed(0)
    expected = ArchitectureEntropyLoss(task, argparse.Namespace(**vars(cfg)))(model, sample)[0]
    torch.manual_seed(0)
    loss, _, log = criterion_of(dictionary, prices={"search": 0.3})(model, sample)
    agree(model, loss, expected)
    torch.manual_seed(0)
    entropy = loss - criterion_of(dictionary, prices={"search": 0.0})(model, sample)[0]
    assert torch.autograd.grad(entropy, model.decoder.architecture, retain_graph=True)[0].abs().max() > 1e-3
    assert log["adaptive_sum_search_compute"] == old["compute"]
    assert log["adaptive_sum_search_block_3_i"] == old["block_3_i"]

    criterion = criterion_of(dictionary, target_compute=0.5)
    for update in range(2):
        model.set_num_updates(update)
        model.zero_grad()
        criterion(model, sample)[0].backward()
    state = criterion.task.state.search
    assert state["excess"] == pytest.approx(float(old["compute"]) / 0.5 - 1)
    assert not model.decoder.architecture.grad.isnan().any()


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"prices": "act=1"}, "--prices 'act=1' is no JSON object"),
        ({"target_args": {"depth": {"rate": 1}}}, "add --target-depth"),
        ({"target_args": {"width": {}}}, "its names are depth, flops, tape, compute"),
        ({"target_depth": 2.0, "target_args": {"depth": {"speed": 1}}}, "give weight, gain, rate and warmup_updates"),
        ({"target_flops": 1.5}, "up to 1"),
        ({"target_tape": 0.0}, "--target-tape is 0.0: use a number above 0"),
        ({"target_compute": -1.0}, "--target-compute is -1.0: use a number above 0"),
        ({"task_criterion": "adaptive_compute_loss"}, "no criterion of a task"),
        (
            {"task_criterion": "ponder_loss", "target_depth": 2.0},
            "--target-depth steers what --task-criterion ponder_loss",
        ),
        ({"distill_from": "x.pt", "distill_temperature": 0.0}, "--distill-temperature is 0.0: use"),
    ],
)
def test_refuses_impossible_flags(dictionary, flags, message):
    with pytest.raises(UsageError, match=message):
        criterion_of(dictionary, **flags)


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"prices": {"skimming": 1}}, "--prices names 'skimming', which decides nothing here: use act, halting"),
        ({"prices": {"act": {"rate": 1}}}, "the price of act has no option 'rate': give weight, warmup_updates"),
        ({"target_flops": 0.5}, "--target-flops steers the router"),
        ({"target_depth": 4.5}, "the model has 4 depths"),
    ],
)
def test_refuses_what_a_model_has_not(build, dictionary, masked, flags, message):
    model = build("albert_act_tiny", halting="act", **ALBERT).train()
    with pytest.raises(UsageError, match=message):
        criterion_of(dictionary, task_criterion="masked_lm", **flags)(model, masked)


def test_refuses_a_model_without_policies(build, dictionary, masked):
    with pytest.raises(UsageError, match="needs a model with a policy: .* or train with --criterion masked_lm"):
        criterion_of(dictionary, task_criterion="masked_lm")(build("albert_act_tiny", halting="none", **ALBERT), masked)

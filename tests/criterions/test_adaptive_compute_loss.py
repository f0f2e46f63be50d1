"""The prices of all policies of a model: values by hand, gradients, what is logged."""

import pytest
import torch
import torch.nn.functional as F

from fairseq_adaptive.modules import recording
from fairseq_adaptive.modules.policies.pondernet import prior_divergence, truncated_geometric
from criterions.compute_losses import (
    ALBERT,
    BOTH,
    HEAD,
    LM,
    PAIRS,
    TAPE,
    agree,
    criterion_of,
    depth_price,
    kept_price,
    logged,
    stir,
    taught,
)


def test_skimming_and_act_in_one_encoder(build, dictionary, masked):
    model = stir(build("albert_act_tiny", **ALBERT, **BOTH))
    criterion = criterion_of(dictionary, task_criterion="masked_lm", prices={"act": 0.3, "skimming": 0.7})
    with recording(model) as traces:
        plain, size, _ = criterion.task_criterion(model, masked)
    trace = traces["encoder.layers"][0]
    loss, _, log = criterion(model, masked)
    assert 0 < kept_price(trace) < 1 < depth_price(trace) < 4
    agree(model, loss, plain + size * (0.3 * depth_price(trace) + 0.7 * kept_price(trace)))
    (loss - plain).backward()  # of the prices alone
    assert taught(model.encoder.layers.halting)
    for predictor, step in zip(model.encoder.layers.router, trace.steps):
        assert predictor[4].weight.grad.any() == step.asked.any()
    assert trace.steps[1].asked.any()
    values = logged(criterion, log, log)
    assert values["act_price"] == pytest.approx(0.3 * float(depth_price(trace)), abs=1e-4)
    assert values["skimming_kept"] == pytest.approx(float(kept_price(trace)), abs=1e-4)
    assert values["act_depth"] == pytest.approx(float(trace.updates.sum() / trace.tokens.sum()), abs=1e-4)
    assert values["act_weight"] == 0.3 and 0 < values["skimming_flops"] < 1
    assert sum(values[f"act_depth_{depth}"] for depth in range(1, 5)) <= 1 and values["skimming_kept_4"] < 1
    assert values["loss"] == pytest.approx(float(log["loss"]) / float(log["sample_size"]) / 0.6931, abs=1e-3)


def test_mixture_of_depths_in_a_language_model(build, dictionary, segments):
    model = stir(build("shared_transformer_lm", router="mixture_of_depths", **LM))
    criterion = criterion_of(dictionary, prices={"mixture_of_depths": 0.5})
    with recording(model) as traces:
        plain, size, _ = criterion.task_criterion(model, segments)
    trace = traces["decoder.layers"][0]
    real = trace.tokens
    price = torch.cat(
        [F.binary_cross_entropy(step.keeping[real], step.kept[real], reduction="none") for step in trace.steps]
    ).mean()
    loss, _, log = criterion(model, segments)
    agree(model, loss, plain + 0.5 * price * size)
    assert logged(criterion, log)["mixture_of_depths_kept"] == pytest.approx(0.5, abs=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        criterion(model.float(), segments)[0].backward()
    assert taught(model.decoder.layers.router)


def test_tape_and_depth_without_nesting(build, dictionary):
    model = build("adatape", halting="act", **TAPE)
    model.register_classification_head(HEAD, num_classes=3)
    model = stir(model.double())
    tokens = torch.randint(4, 44, (5, 9), generator=torch.Generator().manual_seed(1))
    sample = {
        "net_input": {"src_tokens": tokens},
        "target": torch.tensor([0, 2, 1, 0, 1]),
        "ntokens": 45,
        "nsentences": 5,
    }
    criterion = criterion_of(dictionary, task_criterion="sentence_prediction", prices={"tape": 0.4, "halting": 0.2})
    with recording(model) as traces:
        plain, size, _ = criterion.task_criterion(model, sample)
    (trace,) = (each[0] for each in traces.values())
    loss, _, log = criterion(model, sample)
    agree(model, loss, plain + size * (0.2 * depth_price(trace) + 0.4 * trace.reading.cost.mean()))
    loss.backward()
    assert taught(model.encoder.sentence_encoder.layers.halting)
    assert model.encoder.sentence_encoder.bank.weight.grad.any()
    values = logged(criterion, log)
    assert values["tape_length"] == pytest.approx(float(trace.tape_len.double().mean()), abs=1e-4)
    assert values["tape_cost"] == pytest.approx(float(trace.reading.cost.mean()), abs=1e-4)
    assert 0 < values["tape_bank_used"] < 1

    # a task criterion that prices the tape keeps it
    nested = criterion_of(
        dictionary, task_criterion="tape_ponder_loss", task_criterion_args={"ponder_penalty": 0.4}, prices={"act": 0.2}
    )
    torch.testing.assert_close(nested(model, sample)[0].double(), loss.double(), rtol=1e-6, atol=1e-6)


def test_skimming_in_the_encoder_and_act_in_the_decoder(build, dictionary, pairs):
    model = stir(
        build(
            "shared_transformer",
            encoder_router="skimming",
            encoder_router_args=BOTH["router_args"],
            decoder_halting="act",
            dropout=0.0,
            **PAIRS,
        )
    )
    criterion = criterion_of(
        dictionary, task_criterion="label_smoothed_cross_entropy", task_criterion_args={"label_smoothing": 0.1}
    )
    with recording(model) as traces:
        plain, size, _ = criterion.task_criterion(model, pairs)
    encoder, decoder = (traces[f"{side}.layers"][0] for side in ("encoder", "decoder"))
    loss, _, log = criterion(model, pairs)
    agree(model, loss, plain + size * (0.5 * kept_price(encoder) + 0.01 * depth_price(decoder)))
    loss.backward()
    assert taught(model.decoder.layers.halting) and model.encoder.layers.router[0][4].weight.grad.any()
    assert {"skimming_kept", "act_depth"} <= logged(criterion, log).keys()


def test_both_sides_have_prices_of_their_own(build, dictionary, pairs):
    model = stir(build("shared_transformer", halting="act", dropout=0.0, **PAIRS))
    criterion = criterion_of(dictionary, prices={"act": {"weight": 0.5, "warmup_updates": 10}, "decoder_act": 0.2})
    model.set_num_updates(5)
    with recording(model) as traces:
        plain, size, _ = criterion.task_criterion(model, pairs)
    encoder, decoder = (depth_price(traces[f"{side}.layers"][0]) for side in ("encoder", "decoder"))
    loss, _, log = criterion(model, pairs)
    torch.testing.assert_close(loss, plain + size * (0.25 * encoder + 0.1 * decoder))
    assert {"encoder_act_depth", "decoder_act_depth"} <= logged(criterion, log).keys()


def test_pondernet_is_priced_by_its_own_rate_or_a_given_one(build, dictionary, masked):
    model = stir(build("albert_act_tiny", halting="pondernet", halting_args='{"prior_rate": 0.3}', **ALBERT))
    losses = [
        criterion_of(dictionary, task_criterion="masked_lm", prices={"pondernet": price})(model, masked)[0]
        for price in (0.0, 0.5, {"weight": 0.5, "prior_rate": 0.6})
    ]
    with recording(model) as traces:
        model(**masked["net_input"])
    trace = traces["encoder.layers"][0]
    for loss, rate in zip(losses[1:], (0.3, 0.6)):
        divergence = prior_divergence(trace.distribution, truncated_geometric(rate, 4))[trace.tokens].mean()
        torch.testing.assert_close(loss - losses[0], 0.5 * 3 * divergence, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("arch, flags", [("albert_act_tiny", ALBERT), ("shared_transformer_lm", LM)])
def test_a_policy_that_no_one_knows(build, dictionary, masked, segments, arch, flags):
    model = build(arch, router="test_gate", **flags).train()
    name, sample, task = (
        ("masked_lm", masked, "encoder") if arch.startswith("albert") else ("cross_entropy", segments, "decoder")
    )
    gate = getattr(model, task).layers.router
    losses = [
        criterion_of(dictionary, task_criterion=name, prices=prices)(model, sample)
        for prices in ({}, {"test_gate": 0.0}, {"test_gate": {"power": 1}})
    ]
    with recording(model) as traces:
        model(**sample["net_input"])
    trace, size = traces[f"{task}.layers"][0], losses[0][1]
    for (loss, _, _), power in ((losses[0], 2), (losses[2], 1)):
        price = sum((step.keeping**power)[trace.tokens].sum() for step in trace.steps) / trace.tokens.sum()
        torch.testing.assert_close(loss - losses[1][0], 2.0 * price * size)
    (losses[0][0] - losses[1][0]).backward()  # of the price alone
    assert taught(gate)
    values = logged(criterion_of(dictionary, task_criterion=name), losses[0][2])
    assert values["test_gate_openness"] == pytest.approx(
        float(sum(step.keeping[trace.tokens].sum() for step in trace.steps) / trace.tokens.sum()), abs=1e-4
    )
    assert values["test_gate_weight"] == 2.0


@pytest.mark.parametrize("flags", [BOTH, {"router": "mixture_of_depths", "halting": "act"}, {"halting": "pondernet"}])
def test_padding_costs_nothing(build, dictionary, masked, flags):
    model, criterion = (
        stir(build("albert_act_tiny", **ALBERT, **flags)),
        criterion_of(dictionary, task_criterion="masked_lm", prices={flags["halting"]: 3.0}),
    )
    wide = {**masked, "net_input": {"src_tokens": F.pad(masked["net_input"]["src_tokens"], (0, 6), value=1)}}
    wide["target"] = F.pad(masked["target"], (0, 6), value=1)
    (loss, _, log), (wider, _, more) = criterion(model, masked), criterion(model, wide)
    torch.testing.assert_close(wider, loss)
    values, others = logged(criterion, log), logged(criterion, more)
    assert {name for name in values if "_flops" in name or "_kept" in name or "_depth" in name}
    for name in values:
        assert others[name] == pytest.approx(values[name], abs=1e-4), name

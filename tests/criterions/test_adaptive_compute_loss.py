"""The prices of all policies of a model: values by hand, gradients, what is logged, several controllers, errors."""

import argparse
import json

import pytest
import torch
import torch.nn.functional as F
from fairseq.logging import metrics
from fairseq.tasks.fairseq_task import StatefulContainer
from omegaconf import OmegaConf
from torch import nn

from fairseq_adaptive.criterions.adaptive_compute_loss import AdaptiveComputeLoss, AdaptiveComputeLossConfig
from fairseq_adaptive.criterions.architecture_entropy_loss import ArchitectureEntropyLoss, ArchitectureEntropyLossConfig
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules import recording
from fairseq_adaptive.modules.policies import Choice, Router, register_policy
from fairseq_adaptive.modules.policies.pondernet import prior_divergence, truncated_geometric

HEAD = "sentence_classification_head"
ALBERT = {
    "encoder_input_dim": 8,
    "encoder_embed_dim": 16,
    "encoder_ffn_embed_dim": 32,
    "encoder_attention_heads": 2,
    "max_positions": 64,
    "encoder_layers": 4,
    "dropout": 0.0,
    "attention_dropout": 0.0,
}
BOTH = {"router": "skimming", "router_args": '{"noise": 0, "bias": 0}', "halting": "act"}
LM = {
    "decoder_embed_dim": 16,
    "decoder_ffn_embed_dim": 32,
    "decoder_attention_heads": 2,
    "decoder_layers": 4,
    "decoder_unique_layers": 2,
    "dropout": 0.0,
}
PAIRS = {
    f"{side}_{name}": value
    for side in ("encoder", "decoder")
    for name, value in {
        "embed_dim": 16,
        "ffn_embed_dim": 32,
        "attention_heads": 2,
        "layers": 4,
        "unique_layers": 2,
    }.items()
}
TAPE = {
    "encoder_embed_dim": 16,
    "encoder_ffn_embed_dim": 24,
    "encoder_attention_heads": 2,
    "encoder_layers": 4,
    "encoder_unique_layers": 2,
    "tape_mlp_dim": 8,
    "tape_ffn_embed_dim": 8,
    "tape_tokens": 6,
    "tape_bank_size": 40,
    "max_positions": 32,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "pooler_dropout": 0.0,
}


@register_policy("test_gate")
class Gate(Router, nn.Module):
    """A user's own: leaves out tokens below a threshold, and asks a price that no one else knows."""

    monotone, weighs, weight = False, True, 2.0

    def __init__(self, dim: int):
        super().__init__()
        self.score = nn.Linear(dim, 1)

    def choose(self, depth, x, carry, asked, sentence, protected, causal):
        p = self.score(x).squeeze(-1).sigmoid()
        return Choice((p >= 0.5).to(p), p)

    def combine(self, before, after, choice):
        return before + (choice.run * choice.probability).unsqueeze(-1).to(before) * (after - before)

    def price(self, trace, power: int = 2):
        return sum((step.keeping**power * trace.tokens).sum() for step in trace.steps) / trace.tokens.sum()

    def measures(self, trace):
        opened = sum((step.keeping.detach() * trace.tokens).sum() for step in trace.steps)
        return {"openness": (opened, trace.tokens.sum())}


def criterion_of(dictionary, state=None, **flags):
    task = argparse.Namespace(target_dictionary=dictionary, label_dictionary=dictionary, state=StatefulContainer())
    if state is not None:
        task.state.merge_state_dict(state)
    for name in ("prices", "target_args", "task_criterion_args"):
        if isinstance(flags.get(name), dict):
            flags[name] = json.dumps(flags[name])
    cfg = OmegaConf.create(
        {
            "common": {"tpu": False},
            "optimization": {"sentence_avg": False},
            "criterion": AdaptiveComputeLossConfig(**flags),
        }
    )
    return AdaptiveComputeLoss.build_criterion(cfg.criterion, task)


def stir(model):
    """Weights under which tokens stop, pass by and are left out at several depths."""
    torch.manual_seed(4)
    for name, parameter in model.named_parameters():
        if "router" in name and parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.7)
        elif name.endswith("halting.unit.weight"):
            nn.init.normal_(parameter, std=0.4)
    return model.train()


@pytest.fixture
def masked(batch):
    tokens = batch["prev_output_tokens"]
    target = torch.full_like(tokens, 1)
    target[0, 2], target[1, 5], target[2, 1] = 11, 23, 36
    return {"net_input": {"src_tokens": tokens}, "target": target, "ntokens": int((tokens != 1).sum()), "nsentences": 3}


@pytest.fixture
def pairs(batch):
    return {"net_input": batch, "target": batch["prev_output_tokens"].roll(-1, 1), "ntokens": 16, "nsentences": 3}


@pytest.fixture
def segments(dictionary):
    torch.manual_seed(2)
    tokens = torch.randint(4, 44, (3, 11))
    tokens[1, 7:] = 1
    sample = {"net_input": {"src_tokens": tokens[:, :-1]}, "target": tokens[:, 1:].clone(), "nsentences": 3}
    return {**sample, "ntokens": int((sample["target"] != 1).sum())}


def logged(criterion, *logs):
    with metrics.aggregate(new_root=True) as found:
        criterion.reduce_metrics(list(logs))
    return found.get_smoothed_values()


def taught(module):
    return all(each.grad is not None and each.grad.any() for each in module.parameters())


def agree(model, loss, by_hand):
    """In value and in every gradient."""
    torch.testing.assert_close(loss, by_hand, check_dtype=False)
    gradients = [
        torch.autograd.grad(each, list(model.parameters()), retain_graph=True, allow_unused=True)
        for each in (loss, by_hand)
    ]
    for name, found, expected in zip(dict(model.named_parameters()), *gradients):
        if expected is not None:
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, msg=name)


def depth_price(trace):
    real = trace.tokens
    return (trace.updates[real] + trace.remainders[real]).mean()


def kept_price(trace):
    return sum(step.kept.sum() for step in trace.steps) / trace.limit / trace.tokens.sum()


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

"""The price of depth: values by hand, PonderNet's expectation, the controller, warnings, errors."""

import argparse
import logging

import pytest
import torch
import torch.nn.functional as F
from fairseq.tasks.fairseq_task import StatefulContainer
from omegaconf import OmegaConf

from fairseq_adaptive.criterions.ponder_loss import PonderLoss, PonderLossConfig
from fairseq_adaptive.criterions.steering import PATIENCE
from fairseq_adaptive.criterions.task_criterion import build_task_criterion
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules import recording
from fairseq_adaptive.modules.policies.pondernet import prior_divergence, truncated_geometric

TINY = {
    "encoder_input_dim": 8,
    "encoder_embed_dim": 16,
    "encoder_ffn_embed_dim": 32,
    "encoder_attention_heads": 2,
    "max_positions": 32,
    "encoder_layers": 5,
}


def criterion_of(dictionary, **flags):
    task = argparse.Namespace(target_dictionary=dictionary, state=StatefulContainer())
    cfg = PonderLossConfig(**{"task_criterion": "masked_lm", **flags})
    cfg = OmegaConf.create({"common": {"tpu": False}, "optimization": {"sentence_avg": False}, "criterion": cfg})
    return PonderLoss.build_criterion(cfg.criterion, task)


@pytest.fixture
def sample(batch):
    tokens = batch["prev_output_tokens"]
    target = torch.full_like(tokens, 1)
    target[0, 2], target[1, 5], target[2, 1] = 11, 23, 36
    return {"net_input": {"src_tokens": tokens}, "target": target, "ntokens": int((tokens != 1).sum()), "nsentences": 3}


def albert(build, halting="act", **flags):
    model = build("albert_act_tiny", halting=halting, **{**TINY, **flags}).train()
    torch.nn.init.normal_(model.encoder.layers.halting.unit.weight, std=0.5)
    return model


def test_price_of_act_by_hand(build, dictionary, sample):
    model, criterion = albert(build), criterion_of(dictionary, time_penalty=0.3)
    with recording(model) as traces:
        plain, size, _ = criterion.task_criterion(model, sample)
    trace, tokens = traces["encoder.layers"][0], sample["net_input"]["src_tokens"]
    real = tokens != 1
    n, r = trace.updates[real].double(), trace.remainders[real].double()
    loss, _, log = criterion(model, sample)
    torch.testing.assert_close(loss, plain + 0.3 * (n + r).mean() * size)
    assert float(log["loss"]) == pytest.approx(float(plain))
    assert log["ponder_tokens"] == real.sum() and log["ponder_depth"] == n.sum()
    shares = [float(log[f"ponder_share_{depth}"]) for depth in range(1, 6)]
    assert shares == [float((n == depth).sum()) for depth in range(1, 6)]
    loss.backward()
    assert model.encoder.layers.halting.unit.weight.grad.abs().sum() > 0
    assert not any(stack.recorder for stack in [model.encoder.layers])


def test_padding_costs_nothing(build, dictionary, sample):
    model, criterion = albert(build), criterion_of(dictionary, time_penalty=5.0)
    loss = criterion(model, sample)[0]
    wide = {**sample, "net_input": {"src_tokens": F.pad(sample["net_input"]["src_tokens"], (0, 6), value=1)}}
    wide["target"] = F.pad(sample["target"], (0, 6), value=1)
    torch.testing.assert_close(criterion(model, wide)[0], loss)


def test_pondernet_is_the_expected_loss_and_the_divergence(build, dictionary, sample):
    model, criterion = albert(build, "pondernet"), criterion_of(dictionary, kl_weight=0.5, prior_rate=0.4)
    tokens, target = sample["net_input"]["src_tokens"], sample["target"]
    loss, size, _ = criterion(model, sample)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    stack = model.encoder.layers
    stack.every_depth = True
    with recording(model) as traces:
        scores = model(tokens)[0].view(5, 3, -1, 48)
    stack.every_depth = False
    p = traces["encoder.layers"][0].distribution
    masked = target != 1
    expected = sum(
        (p[depth][masked] * F.cross_entropy(scores[depth][masked], target[masked], reduction="none")).sum()
        for depth in range(5)
    )
    divergence = prior_divergence(p, truncated_geometric(0.4, 5))[tokens != 1].mean()
    by_hand = expected + 0.5 * divergence * size
    torch.testing.assert_close(loss, by_hand, rtol=1e-6, atol=1e-6)
    by_hand.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("smoothing", (0.0, 0.1))
def test_pondernet_in_translation(build, dictionary, batch, smoothing):
    """Any criterion that is linear in log-probabilities: label smoothing, too; the encoder adds its divergence."""
    sizes = {"embed_dim": 16, "ffn_embed_dim": 32, "attention_heads": 2, "layers": 4, "unique_layers": 2}
    flags = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in sizes.items()}
    model = build("shared_transformer", halting="pondernet", **flags).train()
    for module in model.modules():
        if hasattr(module, "p"):
            module.p = 0.0
    target = batch["prev_output_tokens"].roll(-1, 1)
    sample = {"net_input": batch, "target": target, "ntokens": 16, "nsentences": 3}
    criterion = criterion_of(
        dictionary,
        task_criterion="label_smoothed_cross_entropy",
        kl_weight=0.0,
        task_criterion_args=f'{{"label_smoothing": {smoothing}}}',
    )
    loss, _, log = criterion(model, sample)
    model.decoder.layers.every_depth = True
    with recording(model) as traces:
        scores = model(**batch)[0].view(4, *target.shape, 48)
    p, real = traces["decoder.layers"][0].distribution, target != 1
    eps = smoothing * 48 / 47  # fairseq's smoothing in torch's terms, see its definition
    expected = sum(
        (p[n][real] * F.cross_entropy(scores[n][real], target[real], reduction="none", label_smoothing=eps)).sum()
        for n in range(4)
    )
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    assert {"encoder_ponder_depth", "decoder_ponder_depth"} <= set(log)


@pytest.mark.parametrize("decoder", ("none", "act"))
def test_pondernet_in_the_encoder_alone(build, dictionary, batch, decoder):
    """There is no loss of every depth, but the decoder reads the expected state; the divergence is due all the same."""
    sizes = {"embed_dim": 16, "ffn_embed_dim": 32, "attention_heads": 2, "layers": 3, "unique_layers": 1}
    flags = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in sizes.items()}
    flags.update(encoder_halting="pondernet", decoder_halting=decoder, dropout=0.0)
    model = build("shared_transformer", **flags).train()
    sample = {"net_input": batch, "target": batch["prev_output_tokens"].roll(-1, 1), "ntokens": 16, "nsentences": 3}
    criterion = criterion_of(
        dictionary, task_criterion="cross_entropy", kl_weight=0.7, prior_rate=0.4, time_penalty=0.0
    )
    with recording(model) as traces:
        plain, size, _ = criterion.task_criterion(model, sample)
    p = traces["encoder.layers"][0].distribution
    divergence = prior_divergence(p, truncated_geometric(0.4, 3))[batch["src_tokens"] != 1].mean()
    torch.testing.assert_close(criterion(model, sample)[0], plain + 0.7 * divergence * size)


def test_warms_up_and_steers_to_a_depth(build, dictionary, sample):
    model = albert(build)
    criterion = criterion_of(dictionary, time_penalty=0.5, time_penalty_warmup_updates=10)
    prices = []
    for update in (0, 5, 10, 20):
        model.set_num_updates(update)
        prices.append(float(criterion(model, sample)[2]["ponder_loss"]))
    assert prices[0] == 0 and prices[1] == pytest.approx(prices[2] / 2) and prices[2] == prices[3]

    steered = criterion_of(dictionary, target_depth=1.5, target_depth_rate=0.1)
    depth = float(criterion(model, sample)[2]["ponder_depth"] / 16)
    for update in range(3):
        for _ in range(2):  # --update-freq 2: one step of the controller an update
            model.set_num_updates(update)
            steered(model, sample)
    state = steered.task.state.ponder
    assert state["excess"] == pytest.approx(depth / 1.5 - 1) and state["update"] == 2
    assert state["sum"] == pytest.approx(2 * 0.1 * (depth / 1.5 - 1))
    prices = []
    for _ in range(2):  # ... and one price, as two workers have it
        model.set_num_updates(3)
        prices.append(float(steered(model, sample)[2]["ponder_loss"]))
    assert prices[0] == prices[1] != 0

    resumed = criterion_of(dictionary, target_depth=1.5, target_depth_rate=0.1)
    resumed.task.state.merge_state_dict({"ponder": dict(state)})
    model.set_num_updates(4)
    assert torch.equal(resumed(model, sample)[0], steered(model, sample)[0])


def test_a_training_gets_the_depth_it_asks_for(build, dictionary, sample):
    """From either end: where all tokens halt at once, and where none halts before the limit of 5."""
    for bias, target in ((5.0, 3.5), (-5.0, 2.0)):
        model = albert(build, dtype=torch.float32)
        torch.nn.init.zeros_(model.encoder.layers.halting.unit.weight)
        torch.nn.init.constant_(model.encoder.layers.halting.unit.bias, bias)
        criterion = criterion_of(dictionary, target_depth=target)
        optimizer, depths = torch.optim.Adam(model.parameters(), 1e-2), []
        for update in range(100):
            model.set_num_updates(update)
            loss, size, log = criterion(model, sample)
            optimizer.zero_grad()
            (loss / size).backward()
            optimizer.step()
            depths.append(float(log["ponder_depth"] / log["ponder_tokens"]))
        assert depths[0] in (1, 5)
        assert sum(depths[-40:]) / 40 == pytest.approx(target, rel=0.2)


@pytest.mark.parametrize(
    "arch, halting",
    (
        ("albert_act_tiny", "act"),
        ("albert_act_tiny", "pondernet"),
        ("shared_transformer", "act"),
        ("shared_transformer", "pondernet"),
    ),
)
def test_bfloat16_follows_float32(build, dictionary, batch, sample, arch, halting):
    """As --bf16 and --amp train on a CPU: halting sums stay float32."""
    task_criterion, flags = "masked_lm", {**TINY, "encoder_embed_dim": 64}
    if arch == "shared_transformer":
        sizes = {"embed_dim": 64, "ffn_embed_dim": 64, "attention_heads": 2, "layers": 4, "unique_layers": 2}
        flags = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in sizes.items()}
        task_criterion = "label_smoothed_cross_entropy"
        sample = {"net_input": batch, "target": batch["prev_output_tokens"].roll(-1, 1), "ntokens": 16, "nsentences": 3}
    losses = {}
    for mixed in (False, True):
        model = build(arch, halting=halting, dropout=0.0, dtype=torch.float32, **flags).train()
        criterion = criterion_of(dictionary, task_criterion=task_criterion)
        optimizer, losses[mixed] = torch.optim.Adam(model.parameters(), 2e-3), []
        for update in range(15):
            model.set_num_updates(update)
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed), recording(model) as traces:
                loss, size, _ = criterion(model, sample)
            optimizer.zero_grad()
            (loss / size).backward()
            optimizer.step()
            losses[mixed].append(float(loss / size))
        for (trace,) in traces.values():
            sums = [trace.remainders, trace.distribution, *(step.probability for step in trace.steps)]
            assert {each.dtype for each in sums if each is not None} == {torch.float32}
    assert losses[True][-1] < 0.9 * losses[True][0] and losses[True] != losses[False]
    assert losses[True] == pytest.approx(losses[False], rel=0.03)  # 2.1% were seen: processors round otherwise


@pytest.mark.parametrize("bias, message", ((9.0, "halted at the first step"), (-9.0, "halted before the last of 5")))
def test_warns_of_collapse_once(build, dictionary, sample, caplog, bias, message):
    model = albert(build)
    torch.nn.init.zeros_(model.encoder.layers.halting.unit.weight)
    torch.nn.init.constant_(model.encoder.layers.halting.unit.bias, bias)
    criterion = criterion_of(dictionary)
    with caplog.at_level(logging.WARNING), torch.no_grad():
        for update in range(PATIENCE + 5):
            model.set_num_updates(update)
            criterion(model, sample)
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 1 and message in warnings[0] and "--time-penalty" in warnings[0]


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"task_criterion": "mlm"}, "--task-criterion 'mlm' is unknown"),
        ({"task_criterion_args": '{"label_smoothing": 0.1}'}, "does not fit masked_lm: .*label_smoothing"),
        ({"task_criterion_args": "label_smoothing=0.1"}, "does not fit masked_lm"),
        ({"target_depth": 0.5}, "--target-depth is 0.5"),
        ({"time_penalty": -1.0}, "--time-penalty is -1.0"),
        ({"prior_rate": 1.0}, "--prior-rate is 1.0: use a number above 0 and below 1"),
    ],
)
def test_refuses_impossible_flags(dictionary, flags, message):
    with pytest.raises(UsageError, match=message):
        criterion_of(dictionary, **flags)


def test_refuses_models_that_do_not_halt(build, dictionary, sample):
    with pytest.raises(UsageError, match="add --halting act, or train with --criterion masked_lm"):
        criterion_of(dictionary)(build("albert_act_tiny", halting="none", **TINY), sample)
    with pytest.raises(UsageError, match="--target-depth 5.5 is impossible: the model has 5 depths"):
        criterion_of(dictionary, target_depth=5.5)(albert(build), sample)
    with pytest.raises(UsageError, match="set --prior-rate"):
        criterion_of(dictionary, target_depth=2.0)(albert(build, "pondernet"), sample)


@pytest.mark.parametrize("flags", ("NaN", "Infinity", "-0.1", "1"))
def test_numbers_of_the_task_criterion_have_ranges(flags):
    cfg = OmegaConf.create(
        {
            "task_criterion": "label_smoothed_cross_entropy",
            "classification_head_name": "head",
            "task_criterion_args": f'{{"label_smoothing": {flags}}}',
            "regression_target": False,
        }
    )
    with pytest.raises(UsageError, match="--label-smoothing is .*: use a number from 0 to below 1"):
        build_task_criterion(cfg, None)

"""Packed encoders by native layers give what modules give, and give way where anything is not known."""

import contextlib
import logging

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules import LayerStack, recording
from fairseq_adaptive.modules.layers import native_layer
from fairseq_adaptive.modules.layers.int8_linear import Int8Linear
from fairseq_adaptive.modules.layers.known import say_once
from fairseq_adaptive.modules.layers.prepacked_linear import constant_weights
from fairseq_adaptive.ops.encoder_layer import OP, native
from models import test_transkimmer
from models.test_changed_modules import LoRA
from models.test_transkimmer import TINY, eager, stack_of

pytestmark = pytest.mark.skipif(
    OP.obstacle("native", "cpu", torch.float32) is not None,
    reason=f"the library is not there: {OP.obstacle('native', 'cpu', torch.float32)}",
)
tokens = test_transkimmer.tokens  # a fixture
KERNELS = "FAIRSEQ_ADAPTIVE_KERNELS"
WIDE = {**TINY, "encoder_embed_dim": 32, "encoder_ffn_embed_dim": 48}  # whole vectors, as int8 wants them


@pytest.fixture
def made(build, monkeypatch):
    """``made(**flags)``: a skimming model in float32."""
    monkeypatch.delenv(KERNELS, raising=False)
    monkeypatch.setattr(native_layer, "_MANY", 0)

    def made(**flags):
        model = eager(build("transkimmer_base", dtype=torch.float32, **{**WIDE, **flags}))
        for layer in stack_of(model):
            for name, each in layer.named_parameters():
                if "proj.weight" in name or "fc" in name:  # attention that is far from a mean
                    each.data.mul_(10)
        return model

    return made


@pytest.fixture
def calls(monkeypatch):
    """How often a layer and a predictor are called natively."""
    counts = {"layer": 0, "predictor": 0}

    def counted(kind, name):
        call = kind.__call__

        def count(self, *args):
            counts[name] += 1
            return call(self, *args)

        monkeypatch.setattr(kind, "__call__", count)

    counted(native.PackedLayer, "layer"), counted(native.PackedPredictor, "predictor")
    return counts


def run(model, tokens, constant=True, **given):
    """States without padding, and who was computed at each depth."""
    with torch.no_grad(), recording(model) as traces:
        if constant:
            with constant_weights():
                out = model(tokens, features_only=True, **given)[0]
        else:
            out = model(tokens, features_only=True, **given)[0]
    (trace,) = traces["encoder.sentence_encoder.layers"]
    return out[tokens.ne(1)], [step.alive for step in trace.steps]


def assert_same(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=tolerance)
    assert len(found[1]) == len(expected[1]) and all(map(torch.equal, found[1], expected[1]))


@pytest.mark.parametrize(
    "flags",
    (
        {},
        {"encoder_unique_layers": 1},
        {"encoder_normalize_before": True, "activation_fn": "relu"},
        {"encoder_embed_dim": 24, "encoder_attention_heads": 3, "encoder_ffn_embed_dim": 31},
        {"layer_norm_eps": 1e-3, "token_types": 2},
    ),
    ids=lambda flags: "-".join(flags) or "plain",
)
def test_is_what_modules_compute(made, tokens, calls, flags):
    model = made(**flags)
    expected = run(model, tokens, constant=False)
    assert not any(calls.values())
    found = run(model, tokens)
    assert calls == {"layer": 3, "predictor": 3}
    assert_same(found, expected)
    for row, length in enumerate((12, 7, 9)):  # alone, bit by bit
        alone = run(model, tokens[row : row + 1, :length])[0]
        assert torch.equal(alone, found[0][tokens.ne(1).nonzero()[:, 0] == row])
    packed = stack_of(model)
    packed.packed = False
    assert_same(run(model, tokens), found)


def test_int8(made, tokens, calls, monkeypatch):
    model = made(encoder_attention_heads=2).int8()
    expected = run(model, tokens, constant=False)
    found = run(model, tokens)
    if native.small_obstacle(16, 32, 48) is not None:
        assert not any(calls.values())
        return
    assert calls == {"layer": 3, "predictor": 3}
    assert (found[0] - expected[0]).norm() <= 0.02 * expected[0].norm()
    alone = run(model, tokens[1:2, :7])[0]
    assert torch.equal(alone, found[0][tokens.ne(1).nonzero()[:, 0] == 1])


@torch.no_grad()
def test_a_map_of_int8_takes_either_product(monkeypatch):
    """And both are made anew of new weights."""
    torch.manual_seed(1)
    each, x = nn.Linear(32, 48).eval(), torch.randn(5, 32)
    each.__class__ = Int8Linear
    for _ in range(2):
        found = []
        for kernels in ("auto", "torch"):
            monkeypatch.setenv(KERNELS, kernels)
            found.append(each(x))
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[0], nn.functional.linear(x, each.weight, each.bias), rtol=0.05, atol=0.05)
        each.weight.mul_(2)
    assert len(each._int8[1]) == (1 if native.small_obstacle(32, 48) else 2)


def test_int8_of_no_whole_vectors_is_torchs(made, tokens, calls):
    model = made(encoder_ffn_embed_dim=50).int8()
    expected = run(model, tokens, constant=False)
    assert_same(run(model, tokens), expected)
    assert calls["layer"] == 0


def change(model, how):
    stack = stack_of(model)
    layer = stack[1]
    if how == "hook":
        layer.fc1.register_forward_hook(lambda module, args, out: 2 * out)
    elif how == "pre-hook of a predictor":
        stack.router[1][1].register_forward_pre_hook(lambda module, args: (-args[0],))
    elif how == "hook on the layer":
        layer.register_forward_hook(lambda module, args, out: 2 * out)
    elif how == "adapter":
        layer.fc2 = LoRA(layer.fc2)
        nn.init.normal_(layer.fc2.up.weight)
    elif how == "a forward of its own":
        plain = layer.final_layer_norm.forward
        layer.final_layer_norm.forward = lambda x: 2 * plain(x)
    elif how == "parametrization":
        nn.utils.parametrizations.weight_norm(layer.fc1)
    elif how == "subclass":
        layer.fc1.__class__ = type("Doubled", (nn.Linear,), {"forward": lambda self, x: 2 * nn.Linear.forward(self, x)})
    elif how == "activation":
        layer.activation_fn = torch.tanh
    elif how == "new weights":
        layer.fc1.weight = nn.Parameter(2 * layer.fc1.weight)
    elif how == "moved weights":
        layer.fc1.weight.data = 2 * layer.fc1.weight
    elif how == "another map":
        layer.fc1 = nn.Linear(32, 48).eval()
    elif how == "eps":
        layer.final_layer_norm.eps = 1.0
    elif how == "heads":
        layer.self_attn.num_heads, layer.self_attn.head_dim = 1, 32
    elif how == "some in int8":
        layer.fc1.__class__ = Int8Linear
    return {"layer": 0 if "predictor" in how else 1, "predictor": 1 if "predictor" in how else 0}


UNKNOWN = (
    "hook",
    "pre-hook of a predictor",
    "hook on the layer",
    "adapter",
    "a forward of its own",
    "parametrization",
    "subclass",
    "activation",
    "some in int8",
)
KNOWN = ("new weights", "moved weights", "another map", "eps", "heads")


@pytest.mark.parametrize("how", UNKNOWN + KNOWN)
@pytest.mark.parametrize("seen", (False, True), ids=("before", "while weights are constant"))
def test_what_is_changed(made, tokens, calls, how, seen):
    """Modules are called where something is not known; what is known, but new, is laid out again."""
    model = made()
    before = run(model, tokens)
    for name in calls:
        calls[name] = 0
    with constant_weights():
        if seen:
            run(model, tokens)
            assert calls == {"layer": 3, "predictor": 3}
        without = change(model, how)
        for name in calls:
            calls[name] = 0
        found = run(model, tokens)
    left = {name: 3 - (without[name] if how in UNKNOWN else 0) for name in calls}
    assert calls == left
    expected = run(model, tokens, constant=False)
    assert_same(found, expected, 1e-4)
    same = how in ("parametrization", "some in int8")  # at first, and nearly
    assert same or not torch.allclose(found[0], before[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("how", ("gradients", "autocast", "dropout", "counter", "float64", "torch", "global hook"))
def test_where_modules_are_called(made, tokens, calls, monkeypatch, how):
    model = made()
    stack = stack_of(model)
    with constant_weights():
        if how == "gradients":
            model(tokens, features_only=True)
        elif how == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                run(model, tokens)
        elif how == "dropout":
            for layer in stack:
                layer.dropout_module.train()
            stack.router.train()
            run(model, tokens)
        elif how == "counter":
            with FlopCounterMode(display=False) as counter:
                run(model, tokens)
            assert counter.get_total_flops() > 0
        elif how == "float64":
            run(model.double(), tokens)
        elif how == "torch":
            monkeypatch.setenv(KERNELS, "torch")
            run(model, tokens)
        else:
            handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: None)
            try:
                run(model, tokens)
            finally:
                handle.remove()
    assert not any(calls.values())


def test_who_asks_by_name_is_told(made, tokens, calls, monkeypatch, caplog):
    model = made()
    monkeypatch.setenv(KERNELS, "native")
    with monkeypatch.context() as patch:
        patch.setattr(native, "slower", lambda *args: pytest.fail("who is faster does not matter"))
        run(model, tokens)
    assert calls == {"layer": 3, "predictor": 3}
    change(model, "hook")
    with pytest.raises(UsageError, match="KERNELS=native, but encoder_layer cannot use it here: .* has hooks"):
        run(model, tokens)
    monkeypatch.delenv(KERNELS)
    say_once.cache_clear()
    with caplog.at_level(logging.INFO):
        run(model, tokens), run(model, tokens)
    said = [each.message for each in caplog.records if "native encoder layers" in each.message]
    assert len(said) == 1 and said[0].startswith("native encoder layers: the plain path is taken, since ")


def test_many_rows_are_torchs_where_that_is_faster(made, tokens, calls, monkeypatch):
    monkeypatch.setattr(native, "slower", lambda width, hidden, rows, threads, small: rows > 20)
    model = made()
    expected = run(model, tokens, constant=False)
    found = run(model, tokens)
    assert_same(found, expected)
    alive = [int(each.sum()) for each in found[1]]
    assert calls["layer"] == sum(each <= 20 for each in alive) and calls["predictor"] < 3


@pytest.mark.parametrize("policies", ({"halting": "act", "halting_kv": "active"}, {"halting": "act"}))
def test_halting(made, tokens, calls, policies):
    model = made(**policies)
    assert_same(run(model, tokens), run(model, tokens, constant=False))
    assert calls["layer"] == (3 if "halting_kv" in policies else 0)


def test_weights_are_laid_out_at_the_second_call(made, tokens, calls, monkeypatch):
    """Or at the first one of many rows: here the first predictor has 28, and what follows fewer."""
    model = made()
    monkeypatch.setattr(native_layer, "_MANY", 29)
    expected = run(model, tokens, constant=False)
    with constant_weights():
        assert_same(run(model, tokens), expected)
        assert not any(calls.values())
        for number in (1, 2):
            assert_same(run(model, tokens), expected)
            assert calls == {"layer": 3 * number, "predictor": 3 * number}
    monkeypatch.setattr(native_layer, "_MANY", 28)
    for name in calls:
        calls[name] = 0
    run(model, tokens)
    assert calls["predictor"] == 1


def test_nothing_outlives_constant_weights(made, tokens):
    model = made()
    before = run(model, tokens)[0]
    for each in model.parameters():
        each.data.mul_(1.1)
    found = run(model, tokens)
    assert_same(found, run(model, tokens, constant=False), 1e-4)
    assert not torch.allclose(found[0], before, rtol=1e-3, atol=1e-3)


def test_looking_at_a_layer_sees_every_module_in_it(made):
    """``_READ`` names what a native call reads of modules beside weights."""
    layer = stack_of(made())[0]
    state = native_layer._state(layer)
    assert [each[0] for each in state] == list(layer.modules()) and native_layer._unchanged(state)
    layer.dropout_module.train()
    assert not native_layer._unchanged(state)


DENSE = {
    "transkimmer_base": {"no_skimming": True},
    "albert_act_base": {"halting": "none"},
    "shared_transformer": {
        "encoder_layers": 3,
        "encoder_unique_layers": 2,
        "decoder_embed_dim": 32,
        "decoder_layers": 2,
    },
}


@pytest.fixture(params=DENSE)
def dense(request, build, monkeypatch):
    """An encoder without policies, and ``states(tokens)`` of its tokens."""
    monkeypatch.delenv(KERNELS, raising=False)
    monkeypatch.setattr(native_layer, "_MANY", 0)
    flags = {**WIDE, "encoder_attention_heads": 2, **DENSE[request.param]}
    if request.param == "albert_act_base":
        flags["encoder_input_dim"] = 16
    model = build(request.param, dtype=torch.float32, **flags).eval()

    def states(tokens, constant=True):
        with torch.no_grad(), constant_weights() if constant else contextlib.nullcontext():
            if request.param == "shared_transformer":
                out = model.encoder(tokens, tokens.ne(1).sum(1))["encoder_out"][0].transpose(0, 1)
            else:
                out = model(tokens, features_only=True)[0]
        return out[tokens.ne(1)]

    return model, states


def layers_of(model):
    return next(each for each in model.modules() if isinstance(each, LayerStack))


def test_a_run_without_policies(dense, tokens, calls):
    model, states = dense
    expected = states(tokens, constant=False)
    assert not any(calls.values())
    found = states(tokens)
    assert calls["layer"] == len(layers_of(model))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with recording(model) as traces:
        assert torch.equal(states(tokens), found)
    for trace in sum(traces.values(), []):
        assert torch.equal(trace.updates, len(layers_of(model)) * tokens.ne(1).long())
    for row, length in enumerate((12, 7, 9)):  # alone, bit by bit
        assert torch.equal(states(tokens[row : row + 1, :length]), found[tokens.ne(1).nonzero()[:, 0] == row])


def test_a_run_without_policies_in_int8(dense, tokens, calls):
    model, states = dense
    model.int8()
    expected, found = states(tokens, constant=False), states(tokens)
    assert calls["layer"] == len(layers_of(model))
    assert (found - expected).norm() <= 0.02 * expected.norm()
    assert torch.equal(states(tokens[1:2, :7]), found[tokens.ne(1).nonzero()[:, 0] == 1])


@pytest.mark.parametrize("how", (*(how for how in UNKNOWN if "predictor" not in how), "one depth hooked"))
@pytest.mark.parametrize("kernels", ("auto", "native"))
def test_a_run_without_policies_of_what_is_changed(dense, tokens, calls, how, kernels, monkeypatch):
    """Modules are called, all of them; also where native layers are asked for by name, which only packed runs have to have."""
    model, states = dense
    monkeypatch.setenv(KERNELS, kernels)
    stack = layers_of(model)
    layer = stack[len(stack) - 1]
    if how == "one depth hooked":
        layer.self_attn.register_forward_hook(lambda module, args, out: (2 * out[0], *out[1:]))
    else:
        monkeypatch.setattr(f"{__name__}.stack_of", lambda model: {1: layer})
        change(model, how)
    expected, found = states(tokens, constant=False), states(tokens)
    assert not any(calls.values())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_weights_of_a_run_without_policies_are_laid_out_at_the_second_call(dense, tokens, calls, monkeypatch):
    model, states = dense
    monkeypatch.setattr(native_layer, "_MANY", 10**6)
    with constant_weights():
        for number in range(3):
            states(tokens)
            assert calls["layer"] == number * len(layers_of(model))

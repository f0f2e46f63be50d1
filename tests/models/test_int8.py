"""Encoders in int8: close to fp32, one sentence the same in any batch, weights as they were, changed modules left alone."""

import copy
import io
import logging
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.models.int8 import in_int8
from fairseq_adaptive.modules import LayerStack, recording
from fairseq_adaptive.modules.layers.attention import FastAttention
from fairseq_adaptive.modules.layers.int8_linear import Int8Linear, project
from fairseq_adaptive.modules.layers.prepacked_linear import PrepackedLinear, constant_weights
from fairseq_adaptive.ops.int8_linear import naive
from fairseq_adaptive.ops.int8_linear.eager import way
from fairseq_adaptive.setups import check_setup
from models.test_changed_modules import LoRA
from old_checkpoints.cases import CASES, build, inputs, unsettle
from old_checkpoints.cases import flags_of as all_flags

SIZES = {"encoder_embed_dim": 32, "encoder_ffn_embed_dim": 64, "encoder_attention_heads": 4}
FAMILIES = "albert_act", "transkimmer", "adatape", "adatape_parity", "adatape_vit"
NAMES = [name for name, (arch, _) in CASES.items() if arch in FAMILIES]
NAMES += ["albert_plain", "adatape_plain", "vit_plain"]
PLAIN = {
    "albert_plain": ("albert_act", {**CASES["albert_act"][1], "halting": "none"}),
    "adatape_plain": ("adatape", {**CASES["adatape"][1], "tape_tokens": 0}),
    "vit_plain": ("adatape_vit", {**CASES["adatape_vit"][1], "tape_tokens": 0}),
}


def made(name, **flags):
    """A model of a family in evaluation, and its input."""
    arch, given = (CASES | PLAIN)[name]
    torch.manual_seed(1)
    model = unsettle(build(arch, all_flags(arch, {**given, **SIZES, **flags}))).eval()
    return model, inputs(arch)


def maps(model):
    return [each for each in model.modules() if type(each) is Int8Linear]


class Emulated(nn.Module):
    """The definition in the place of a map."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        rows = naive.int8_linear(x.reshape(-1, x.size(-1)), self.base.weight, self.base.bias)
        return rows.float().view(*x.shape[:-1], rows.size(1))


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_is_what_the_definition_gives(name):
    model, given = made(name)
    plain = model(**given)[0]
    emulated = copy.deepcopy(model).int8()
    model.int8()
    for parent in list(emulated.modules()):
        for child, each in list(parent.named_children()):
            if type(each) is Int8Linear:
                setattr(parent, child, Emulated(each))
    found, expected = model(**given)[0], emulated(**given)[0]
    assert not torch.equal(found, plain)
    # both round, here and there differently by one of 255 steps where float32 does
    assert (found - expected).norm() <= 0.02 * expected.norm()
    assert len(maps(model)) == len(model.maps_in_int8) >= 6


@pytest.mark.parametrize("name", ("transkimmer_dense", "albert_plain", "adatape_plain", "vit_plain"))
@torch.no_grad()
def test_is_close_to_float32(name):
    model, given = made(name)
    expected = model(**given)[0]
    found = model.int8()(**given)[0]
    assert 1e-4 * expected.norm() < (found - expected).norm() < 0.05 * expected.norm()


def test_what_runs_in_int8(caplog):
    with caplog.at_level(logging.INFO):
        model = made("adatape_skimming")[0].int8()
    layer = [f"{part}_proj" for part in ("self_attn.k", "self_attn.v", "self_attn.q", "self_attn.out")]
    layer += ["fc1", "fc2", "tape_ffn.fc1", "tape_ffn.fc2"]
    stack = "encoder.sentence_encoder.layers"
    expected = {f"{stack}.{depth}.{each}" for depth in range(3) for each in layer}
    expected |= {f"{stack}.router.{depth}.1" for depth in range(3)}
    assert set(model.maps_in_int8) == expected
    (said,) = [each.message for each in caplog.records if each.message.startswith("int8: ")]
    assert (
        said.startswith(f"int8: {len(expected)} linear maps of layers, routers and output layers run by ")
        and way().name in said
    )
    halting = made("albert_act")[0].int8()
    assert not any("halting" in name or "head" in name or "pooler" in name for name in halting.maps_in_int8)


@torch.no_grad()
def test_a_map_and_its_gradients():
    torch.manual_seed(1)
    plain = nn.Linear(24, 10)
    made_int8, x = copy.deepcopy(plain).eval(), torch.randn(5, 2, 24)
    made_int8.__class__ = Int8Linear
    found, expected = made_int8(x), naive.int8_linear(x.flatten(0, 1), plain.weight, plain.bias)
    torch.testing.assert_close(found.flatten(0, 1).double(), expected, rtol=1e-5, atol=1e-6)
    with torch.enable_grad():
        x.requires_grad_()
        assert torch.equal(made_int8(x), plain(x))
        (grad,) = torch.autograd.grad(made_int8(x).sum(), x)
        torch.testing.assert_close(grad, plain.weight.sum(0).expand_as(grad))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(made_int8(x), plain(x))


@torch.no_grad()
def test_one_rounding_for_several_maps():
    torch.manual_seed(1)
    several, x = [nn.Linear(24, size).eval() for size in (10, 3, 24)], torch.randn(5, 2, 24)
    for each in several:
        each.__class__ = Int8Linear
    assert all(torch.equal(found, each(x)) for found, each in zip(project(x, *several), several))
    several[1].register_forward_hook(lambda module, args, out: out + 1)
    assert torch.equal(project(x, *several)[1], several[1](x))


@pytest.mark.parametrize("name", ("transkimmer", "transkimmer_dense", "albert_act", "adatape_plain"))
@torch.no_grad()
def test_a_sentence_in_any_batch(name):
    """Maps are the same bit by bit; attention rounds differently in other batches, which may move a number by one step."""
    model, given = made(name)
    model.int8()
    tokens = given["src_tokens"]
    together = model(tokens, features_only=True)[0]
    for row in range(len(tokens)):
        length = int(tokens[row].ne(1).sum())
        alone = model(tokens[row : row + 1, :length], features_only=True)[0]
        assert (alone[0] - together[row, :length]).norm() < 0.02 * alone.norm()


@pytest.mark.parametrize("name", ("transkimmer", "albert_act", "adatape_act", "adatape_skimming"))
@torch.no_grad()
def test_dense_is_packed(name):
    model, given = made(name)
    model.int8()
    (stack,) = (each for each in model.modules() if isinstance(each, LayerStack))
    found = []
    for packed in (False, True):
        stack.packed = packed
        with recording(model) as traces:
            out = model(**given, features_only=True)[0]
        found.append((out, next(iter(traces.values()))[0].updates))
    agree = (found[0][1] == found[1][1]).float().mean()
    there = given["src_tokens"].ne(1)
    assert agree > 0.9 and (found[0][0] - found[1][0])[there].norm() < 0.05 * found[0][0][there].norm()


@torch.no_grad()
def test_a_long_sequence_is_int8_too():
    """fairseq's attention reads the weights of projections; ours must call them at any length."""
    torch.manual_seed(1)
    attention, x = FastAttention(16, 2, self_attention=True).eval(), torch.randn(140, 2, 16)
    padding = torch.arange(140) >= torch.tensor([[140], [90]])
    expected = attention(x, x, x, padding, need_weights=False)[0]
    for each in attention.children():
        if isinstance(each, nn.Linear):
            each.__class__ = Int8Linear
    found, weights = attention(x, x, x, padding, need_weights=False)
    assert weights is None and 1e-4 < (found - expected).norm() / expected.norm() < 0.05
    other, weights = attention(x, x, x, padding, need_weights=True)
    assert weights.shape == (2, 140, 140)
    assert (other - found).norm() < 0.01 * found.norm()


@torch.no_grad()
def test_weights_stay_and_follow():
    model, given = made("transkimmer_dense")
    before = copy.deepcopy(model.state_dict())
    plain = model(**given)[0]
    first = model.int8()(**given)[0]
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model.int8()(**given)[0], first)  # said twice
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model.encoder.sentence_encoder.layers))):
        assert maps(other) and all("_int8" not in vars(each) for each in maps(other))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh, _ = made("transkimmer_dense", layer_norm_eps=1e-5)
    fresh.load_state_dict(torch.load(file))
    assert torch.equal(fresh(**given)[0], plain)
    doubled = {name: value * 2 if "fc1" in name else value for name, value in before.items()}
    model.load_state_dict(doubled)
    fresh.load_state_dict(doubled)
    assert torch.equal(model(**given)[0], fresh.int8()(**given)[0])
    assert not torch.equal(model(**given)[0], first)


def test_trains_never():
    model, given = made("transkimmer_dense")
    model.int8()
    with pytest.raises(UsageError, match="in int8 is for inference: load it without int8"):
        model.train()
    assert not made("transkimmer_dense", int8=True)[0].training
    out = model.eval()(**given)[0]
    out.sum().backward()  # as fp32
    assert all(each.weight.grad is not None for each in maps(model))


def test_a_training_refuses_the_flag():
    arch, given = CASES["transkimmer"]
    flags = all_flags(arch, {**given, "int8": True, "_name": "transkimmer"})
    with pytest.raises(UsageError, match="--int8 is for inference: leave it out of a training"):
        check_setup(type("cfg", (), {"model": flags})(), build(arch, flags), nn.Module())


@pytest.mark.parametrize("name", FAMILIES)
def test_the_flag(name):
    model, given = made(name, int8=True)
    assert maps(model) and not model.training
    other, _ = made(name)
    assert not maps(other)
    with torch.no_grad():
        assert torch.equal(model(**given)[0], other.int8()(**given)[0])


class Subclass(nn.Linear):
    pass


@torch.no_grad()
def test_changed_maps_stay_as_they_are():
    model, given = made("transkimmer_dense")
    stack = model.encoder.sentence_encoder.layers
    stack[0].self_attn.q_proj = LoRA(stack[0].self_attn.q_proj)
    stack[0].fc1.register_forward_hook(lambda module, args, out: 2 * out)
    parametrize.register_parametrization(stack[1].fc1, "weight", nn.Identity())
    stack[1].fc2.__class__ = Subclass
    stack[2].fc1.forward = lambda x: F.linear(x, stack[2].fc1.weight)
    changed = [stack[0].fc1, stack[1].fc1, stack[1].fc2, stack[2].fc1]
    expected = model(**given)[0]
    model.int8()
    assert not any(type(each) is Int8Linear for each in changed) and len(maps(model)) == 3 * 6 - 5
    found = model(**given)[0]
    assert (found - expected).norm() < 0.05 * expected.norm()


@torch.no_grad()
def test_together_with_prepacked_weights():
    model, given = made("transkimmer_dense")
    model.make_generation_fast_()
    assert any(type(each) is PrepackedLinear for each in model.modules())
    first = model.int8()(**given)[0]
    model.make_generation_fast_()
    with constant_weights():
        assert maps(model) and torch.equal(model(**given)[0], first)


def test_operations_are_counted():
    model, given = made("transkimmer_dense", encoder_embed_dim=64)
    with torch.no_grad(), FlopCounterMode(display=False) as plain:
        model(**given)
    model.int8()
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        model(**given)
    assert 0.9 * plain.get_total_flops() <= counted.get_total_flops() <= 1.5 * plain.get_total_flops()


def test_refused_for_other_families_and_types():
    with pytest.raises(
        UsageError, match="Linear does not run in int8: transkimmer, albert_act, adatape, shared_transformer and"
    ):
        in_int8(nn.Linear(2, 2))
    with pytest.raises(UsageError, match="leave out --fp16 or int8"):
        made("transkimmer")[0].half().int8()
    model, given = made("transkimmer")
    with torch.no_grad(), pytest.raises(UsageError, match="made of float32, and these weights are torch.float64"):
        model.int8().double()(**given)

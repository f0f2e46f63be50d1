"""The plain-torch encoder against its seed, jaketae/param-share-transformer, whose documented algorithm is restated here."""

import pytest
import torch
from torch import nn

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules import ParameterSharedTransformerEncoder, recording
from fairseq_adaptive.modules.policies import ACT, Skimming

SIZES = {"d_model": 16, "nhead": 4, "dim_feedforward": 32, "num_unique_layers": 3, "num_total_layers": 6}


def seed_forward(state, mode, x, mask=None, src_key_padding_mask=None):
    """What the seed computes with these weights: sequence-first layers of torch, in the seed's order (M = N/2)."""
    layers = nn.ModuleList([nn.TransformerEncoderLayer(16, 4, 32, 0.1, "relu") for _ in range(3)])
    norm = nn.LayerNorm(16) if "norm.weight" in state else None
    nn.ModuleDict({"layers": layers, **({"norm": norm} if norm else {})}).load_state_dict(state)
    order = {"sequence": (0, 0, 1, 1, 2, 2), "cycle": (0, 1, 2, 0, 1, 2), "cycle_rev": (0, 1, 2, 2, 1, 0)}[mode]
    for index in order:
        x = layers[index].eval()(x, mask, src_key_padding_mask)
    return x if norm is None else norm(x)


@pytest.mark.parametrize("mode", ("sequence", "cycle", "cycle_rev"))
@pytest.mark.parametrize("norm", (False, True))
def test_equals_the_seed_on_transposed_input(mode, norm):
    torch.manual_seed(0)
    model = ParameterSharedTransformerEncoder(mode=mode, norm=norm, **SIZES).eval()
    x = torch.randn(4, 7, 16)
    padding = torch.zeros(4, 7, dtype=torch.bool)
    padding[1, 5:] = padding[3, 2:] = True
    mask = torch.triu(torch.ones(7, 7, dtype=torch.bool), 1)
    for keywords in ({}, {"mask": mask}, {"src_key_padding_mask": padding}):
        expected = seed_forward(model.state_dict(), mode, x.transpose(0, 1), **keywords).transpose(0, 1)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                torch.testing.assert_close(model(x, **keywords), expected, rtol=0, atol=1e-6)


def test_rows_do_not_see_each_other_nor_padding():
    torch.manual_seed(0)
    model = ParameterSharedTransformerEncoder(**SIZES).eval()
    x = torch.randn(3, 7, 16)
    padding = torch.zeros(3, 7, dtype=torch.bool)
    padding[0, 4:] = True
    out = model(x, src_key_padding_mask=padding)
    torch.testing.assert_close(out[1:], model(x[1:]), rtol=0, atol=1e-6)
    torch.testing.assert_close(out[0, :4], model(x[:1, :4])[0], rtol=0, atol=1e-6)


def test_verbose_prints_the_layers_in_order(capsys):
    model = ParameterSharedTransformerEncoder(**SIZES)
    model(torch.randn(1, 2, 16), verbose=True)
    assert capsys.readouterr().out.split("\n")[:-1] == [f"layer {index}" for index in (0, 1, 2, 2, 1, 0)]
    model(torch.randn(1, 2, 16))
    assert capsys.readouterr().out == ""


def test_defaults_are_the_seeds_and_layers_start_different():
    model = ParameterSharedTransformerEncoder()
    first, second = model.layers[0], model.layers[1]
    assert model.layers.schedule == (0, 1, 2, 2, 1, 0) and model.norm is None
    assert (first.linear1.in_features, first.linear1.out_features, first.self_attn.num_heads) == (512, 2048, 16)
    assert first.dropout.p == 0.1 and first.activation is nn.functional.relu
    assert not torch.equal(first.linear1.weight, second.linear1.weight)
    assert sum(1 for _ in model.state_dict()) == 3 * len(first.state_dict())


def test_any_number_of_depths_and_gradients():
    model = ParameterSharedTransformerEncoder(8, 2, 8, 0.0, "gelu", 2, 5, "cycle", True).double()
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(model, (x,))


@pytest.mark.parametrize("rule", ("act", "ut_act", "pondernet", "saturation"))
def test_halting(rule):
    """Updates are between 1 and N, a padded sentence gives what it gives alone, and every parameter has a gradient."""
    torch.manual_seed(0)
    model = ParameterSharedTransformerEncoder(**SIZES, dropout=0.0, halting=rule).double()
    x = torch.randn(3, 7, 16, dtype=torch.float64)
    padding = torch.zeros(3, 7, dtype=torch.bool)
    padding[0, 4:] = True
    model(x, src_key_padding_mask=padding).square().sum().backward()
    assert all(each.grad is not None and each.grad.isfinite().all() for each in model.parameters())
    model.eval()
    with recording(model) as traces:
        out = model(x, src_key_padding_mask=padding)
        alone = model(x[:1, :4])
    together, single = traces["layers"]
    assert together.updates[~padding].min() >= 1 and together.updates.max() <= 6
    assert together.updates[padding].eq(0).all() and single.updates.equal(together.updates[:1, :4])
    torch.testing.assert_close(out[0, :4], alone[0], rtol=0, atol=1e-12)


def test_act_is_its_definition():
    """State, accumulated probability and remainder, token by token, as in ALBERT-ACT."""
    torch.manual_seed(0)
    model = ParameterSharedTransformerEncoder(**SIZES, halting=ACT(16, threshold=0.9)).double().eval()
    x = state = torch.randn(2, 5, 16, dtype=torch.float64)
    mask = torch.triu(torch.ones(5, 5, dtype=torch.bool), 1)
    total, running = torch.zeros(2, 5, dtype=torch.float64), torch.ones(2, 5, dtype=torch.bool)
    updates = torch.zeros(2, 5)
    for index in (0, 1, 2, 2, 1, 0):
        after = model.layers._modules[str(index)](state.transpose(0, 1), mask).transpose(0, 1)
        p = model.layers.halting.probability(after)
        stops = running & (total + p > 0.9)
        weight = torch.where(stops, 1 - total, p) * running
        mixed = weight.unsqueeze(-1) * after + (1 - weight).unsqueeze(-1) * state
        state = torch.where(running.unsqueeze(-1), mixed, state)
        updates += running
        total, running = total + p * (running & ~stops), running & ~stops
    with recording(model) as traces:
        torch.testing.assert_close(model(x, mask), state, rtol=0, atol=1e-12)
    assert traces["layers"][0].updates.equal(updates.to(traces["layers"][0].updates.dtype))
    assert updates.max() < 6  # some halted before the last depth


def test_halting_that_cannot_be():
    for name, reason in (("nonsense", "unknown halting rule"), ("margin", "word scores")):
        with pytest.raises(UsageError, match=reason):
            ParameterSharedTransformerEncoder(**SIZES, halting=name)
    names = {name for name, _ in ParameterSharedTransformerEncoder(**SIZES, halting="none").named_parameters()}
    assert names == {name for name, _ in ParameterSharedTransformerEncoder(**SIZES).named_parameters()}


@pytest.mark.parametrize(
    "router, rule, kv",
    [
        ("skimming", None, {}),
        ("mixture_of_depths", "act", {"halting_kv": "active"}),
        (None, "ut_act", {"halting_kv": "active"}),
        ("skimming", "pondernet", {"router_kv": "recompute"}),
        (Skimming(16, 6, 1.0), "act", {}),
    ],
)
def test_policies_save_compute_in_evaluation(router, rule, kv):
    """Packed equals dense, alone and in a batch, with a mask and without; fewer tokens go through the layers."""
    torch.manual_seed(0)
    model = ParameterSharedTransformerEncoder(**SIZES, dropout=0.0, norm=True, router=router, halting=rule, **kv)
    for name, parameter in model.named_parameters():
        if "router" in name or "halting" in name:
            torch.nn.init.normal_(parameter, std=0.6)
    model = model.double().eval()
    x, padding = torch.randn(3, 7, 16, dtype=torch.float64), torch.zeros(3, 7, dtype=torch.bool)
    padding[0, 4:] = True
    mask, ran = torch.triu(torch.ones(7, 7, dtype=torch.bool), 1), []
    for layer in map(model.layers.layer, range(3)):
        layer.register_forward_pre_hook(lambda layer, args: ran.append(args[0].size(0) * args[0].size(1)))
    for keywords in ({"src_key_padding_mask": padding}, {"src_key_padding_mask": padding, "mask": mask}):
        dense = model(x, **keywords)
        ran.clear()
        with torch.no_grad():
            packed = model(x, **keywords)
            alone = model(x[:1, :4], **({"mask": mask[:4, :4]} if "mask" in keywords else {}))
        torch.testing.assert_close(packed[~padding], dense[~padding], rtol=0, atol=1e-10)
        torch.testing.assert_close(alone[0], dense[0, :4], rtol=0, atol=1e-10)
        assert kv.get("router_kv") or sum(ran) < 6 * (21 + 4)


def test_a_reader():
    torch.manual_seed(0)
    model = ParameterSharedTransformerEncoder(**SIZES, dropout=0.0, reader="tape", router="skimming").double().eval()
    x = torch.randn(3, 7, 16, dtype=torch.float64)
    dense, padding, read = model(x)
    with torch.no_grad():
        packed, *_ = model(x)
    assert dense.shape == (3, 7 + read.live.size(1), 16) and padding[:, 7:].equal(~read.live) and read.live.any()
    torch.testing.assert_close(packed[~padding], dense[~padding], rtol=0, atol=1e-10)
    assert (dense[:, :7] - ParameterSharedTransformerEncoder(**SIZES).double().eval()(x)).abs().max() > 1e-3

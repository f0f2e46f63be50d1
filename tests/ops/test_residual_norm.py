"""The fused residual branch against its definition, by value and by gradient, and what its dropout draws."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F

from fairseq_adaptive.modules.transformer_xl.blocks import FeedForwardBlock
from fairseq_adaptive.ops import OPS
from fairseq_adaptive.ops.residual_norm import naive, residual_norm

GRADIENTS = ("x", "branch", "weight", "bias")
SIZES = [(1, 1), (63, 5), (500, 33), (4, 2100)]


def rows_of(rows, backend, device):
    return min(rows, 63) if backend == "triton" and device == "cpu" else rows  # interpreted, a program takes ms


def inputs(shape, dtype=torch.float32):
    torch.manual_seed(1)
    states = {"x": torch.randn(shape), "branch": 0.5 + torch.rand(shape)}
    norm = {"weight": torch.randn(shape[-1]), "bias": torch.randn(shape[-1])}
    return {name: value.to(dtype) for name, value in {**states, **norm}.items()}


def results(function, arguments, used=("total", "normalized"), **settings):
    """Every output and every gradient by name, of a loss that reads the outputs in ``used``."""
    leaves = {name: value.clone().requires_grad_() for name, value in arguments.items()}
    outputs = dict(zip(("total", "normalized"), function(**leaves, **settings)))
    factors = torch.linspace(-1, 2, outputs["total"].numel(), device=outputs["total"].device).view_as(outputs["total"])
    sum((outputs[name] * factors.roll(at, -1)).sum() for at, name in enumerate(used)).backward()
    grads = {f"d {name}": leaf.grad for name, leaf in leaves.items()}
    return {**{name: value.detach() for name, value in outputs.items()}, **grads}


def check(ours, expected, **tolerance):
    for name in expected:
        torch.testing.assert_close(ours[name], expected[name], **tolerance, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("used", [("total", "normalized"), ("normalized",)], ids=("pre-LN", "post-LN"))
@pytest.mark.parametrize("size", SIZES)
def test_equals_its_definition(size, used, backend, device, poisoned):
    arguments = inputs((rows_of(size[0], backend, device), size[1]))
    ours, expected = (results(function, arguments, used, eps=1e-3) for function in (residual_norm, naive.residual_norm))
    check(ours, expected, rtol=1e-4, atol=1e-4)


def test_only_the_sum_is_used(backend):
    arguments = inputs((5, 7))
    ours = results(residual_norm, arguments, ("total",))
    assert torch.equal(ours["d x"], ours["d branch"]) and (ours["d bias"] is None or not ours["d bias"].any())
    torch.testing.assert_close(ours["d x"].flatten(), torch.linspace(-1, 2, 35))


def test_double_precision():
    arguments = inputs((63, 7), torch.float64)
    check(results(residual_norm, arguments), results(naive.residual_norm, arguments))


@pytest.mark.parametrize("dropout", (0.0, 0.3))
@pytest.mark.parametrize(
    "dtype, branch_dtype",
    [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16), (torch.float32, torch.bfloat16)],
)
def test_half_precision(dtype, branch_dtype, dropout, backend, device):
    """As exact as the rounding of what goes in and out; the last pair is what autocast makes of a layer."""
    arguments = inputs((rows_of(500, backend, device), 64), dtype)
    arguments["branch"] = arguments["branch"].to(branch_dtype)
    ours = results(residual_norm, arguments, dropout=dropout)
    assert ours["total"].dtype == ours["normalized"].dtype == dtype and ours["d branch"].dtype == branch_dtype
    exact = {name: value.float() for name, value in arguments.items()}
    kept = ours["total"] != arguments["x"]
    expected = results(lambda branch, **rest: naive.residual_norm(branch=branch * kept / (1 - dropout), **rest), exact)
    sums = ("d weight", "d bias")  # which torch's kernel takes in half precision on a CPU
    for name in expected.keys() - (sums if backend == "torch" else ()):
        difference = (ours[name].float() - expected[name]).norm() / expected[name].norm()
        assert difference < 2 * torch.finfo(branch_dtype).eps, name


@pytest.mark.parametrize("dropout", (0.1, 0.5, 1.0))
def test_backward_pass_draws_the_same_mask(dropout, backend, device):
    """Against the definition with the mask that the sum shows."""
    arguments = inputs((rows_of(500, backend, device), 97))
    ours = results(residual_norm, arguments, dropout=dropout)
    kept = ours["total"] != arguments["x"]
    scaled = kept / (1 - dropout) if dropout < 1 else torch.zeros_like(arguments["x"])
    expected = results(lambda branch, **rest: naive.residual_norm(branch=branch * scaled, **rest), arguments)
    check(ours, expected, rtol=1e-4, atol=1e-4)
    deviation = (dropout * (1 - dropout) / kept.numel()) ** 0.5
    assert kept.double().mean().item() == pytest.approx(1 - dropout, abs=4 * deviation)


def test_masks_follow_the_seed_and_have_no_pattern(backend):
    arguments = inputs((63, 256))

    def draw():
        return (residual_norm(**arguments, dropout=0.5)[0] != arguments["x"]).double()

    torch.manual_seed(3)
    first, second = draw(), draw()
    torch.manual_seed(3)
    assert torch.equal(draw(), first)
    pairs = [(first, second), (first[1:], first[:-1]), (first[:, 1:], first[:, :-1])]
    for one, other in pairs:  # calls, rows and columns are independent
        assert (one == other).double().mean().item() == pytest.approx(0.5, abs=2 / one.numel() ** 0.5)
    for axis in (0, 1):
        assert first.mean(axis).sub(0.5).abs().max() < 2.5 / first.size(axis) ** 0.5


def test_nothing_depends_on_strides(backend):
    arguments = inputs((3, 4, 6))
    strided = {
        name: value.transpose(0, 1).contiguous().transpose(0, 1) if value.dim() == 3 else value
        for name, value in arguments.items()
    }
    wide = torch.full((12,), float("nan"))
    wide[::2] = arguments["weight"]
    check(results(residual_norm, {**strided, "weight": wide[::2]}), results(residual_norm, arguments))


def test_no_rows(backend, poisoned):
    ours = results(residual_norm, inputs((0, 5)), dropout=0.1)
    assert ours["total"].shape == ours["normalized"].shape == (0, 5)
    assert ours["d weight"].eq(0).all() and ours["d bias"].eq(0).all()


@pytest.mark.parametrize("normalize_before", (False, True), ids=("post-LN", "pre-LN"))
def test_training_ends_where_that_of_the_modules_does(normalize_before, build, batch, backend, device, monkeypatch):
    """Four updates; where the variable says torch, layers call their modules."""
    calls = []
    fused = "fairseq_adaptive.modules.layers.residual.residual_norm"
    monkeypatch.setattr(fused, lambda *args: calls.append(1) or residual_norm(*args))
    flags = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (
            ("embed_dim", 8),
            ("ffn_embed_dim", 8),
            ("attention_heads", 2),
            ("layers", 1),
            ("unique_layers", 1),
            ("normalize_before", normalize_before),
        )
    }
    batch = {name: value.to(device) for name, value in batch.items()}

    def train():
        model = build("shared_transformer", dtype=torch.float32, dropout=0.0, **flags).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(4):
            loss = F.cross_entropy(model(**batch)[0].flatten(0, 1), batch["prev_output_tokens"].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.detach()

    ours = train()
    # a pre-LN layer has no norm behind its last sublayer
    assert len(calls) == (0 if backend == "torch" else 4 * (3 if normalize_before else 5))
    monkeypatch.setenv("FAIRSEQ_ADAPTIVE_KERNELS", "torch")
    torch.testing.assert_close(ours, train(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("normalize_before", (False, True))
def test_blocks_of_transformer_xl(normalize_before, backend):
    block, x = FeedForwardBlock(8, 16, normalize_before=normalize_before), torch.randn(2, 3, 8)
    normalized = F.layer_norm(x, (8,)) if normalize_before else x
    total = x + block.fc2(block.fc1(normalized).relu())
    torch.testing.assert_close(block(x), total if normalize_before else F.layer_norm(total, (8,)))


def test_apex_gets_the_sum(monkeypatch):
    """NVIDIA's package is not there: a function of its name and its parameters' order shows how it is called."""
    package = types.ModuleType("apex.normalization.fused_layer_norm")
    package.fused_layer_norm_affine = lambda x, weight, bias, shape, eps=1e-6: F.layer_norm(x, shape, weight, bias, eps)
    for name in ("apex", "apex.normalization"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, package.__name__, package)
    module, _, function = OPS["residual_norm"].backends["apex"].partition(":")
    monkeypatch.delitem(sys.modules, module, raising=False)
    apex = getattr(__import__(module, fromlist=[function]), function)
    monkeypatch.delitem(sys.modules, module)
    arguments = inputs((5, 7))
    check(results(apex, arguments, eps=0.1), results(naive.residual_norm, arguments, eps=0.1), rtol=0, atol=0)

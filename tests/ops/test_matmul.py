"""oneDNN's products are those of torch, with every gradient, and leave to torch what is not theirs."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from fairseq_adaptive.modules.layers.prepacked_linear import PrepackedLinear
from fairseq_adaptive.ops import matmul

ROWS, WIDTH, OUT = 130, 96, 101


def tensors(shape=(ROWS,), dtype=torch.float32):
    torch.manual_seed(1)
    return [torch.randn(*each, dtype=dtype) for each in ((*shape, WIDTH), (OUT, WIDTH), (OUT,))]


def results(function, x, weight, bias):
    leaves = [None if each is None else each.detach().requires_grad_() for each in (x, weight, bias)]
    y = function(*leaves)
    y.float().sin().sum().backward()
    return y.detach(), *(None if leaf is None else leaf.grad for leaf in leaves)


def calls(monkeypatch):
    """A list that grows with each product of oneDNN."""
    found, onednn = [], matmul._onednn
    monkeypatch.setattr(matmul, "_onednn", lambda *args: found.append(args[0].shape) or onednn(*args))
    return found


@pytest.mark.parametrize("shape", ((ROWS,), (5, 26)), ids=str)
@pytest.mark.parametrize("with_bias", (True, False))
def test_linear_and_its_gradients(shape, with_bias, monkeypatch):
    x, weight, bias = tensors(shape)
    bias = bias if with_bias else None
    found = calls(monkeypatch)
    ours = results(matmul.linear, x, weight, bias)
    assert len(found) == 3
    for mine, theirs in zip(ours, results(F.linear, x, weight, bias)):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_only_gradients_that_are_wanted(monkeypatch):
    x, weight, _ = tensors()
    found = calls(monkeypatch)
    y = matmul.linear(x, weight.requires_grad_())
    y.sum().backward()
    assert len(found) == 2 and weight.grad.is_contiguous()  # no product for the gradient of x
    with torch.no_grad():
        assert not matmul.linear(x, weight).requires_grad


def test_gaps_between_rows():
    x, weight, bias = tensors()
    gaps = [torch.cat((each, torch.full_like(each, float("nan"))), 1)[:, :WIDTH] for each in (x, weight)]
    assert not any(each.is_contiguous() for each in gaps)
    for mine, theirs in zip(results(matmul.linear, *gaps, bias), results(F.linear, x, weight, bias)):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16), ids=str)
def test_other_types_take_torchs_way(dtype, monkeypatch):
    found = calls(monkeypatch)
    pair = [results(each, *tensors(dtype=dtype)) for each in (matmul.linear, F.linear)]
    assert not found and all(torch.equal(*each) for each in zip(*pair))
    results(matmul.linear, *tensors(shape=(3,)))
    assert not found  # small


def test_autocast_takes_torchs_way(monkeypatch):
    found = calls(monkeypatch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pair = [results(each, *tensors()) for each in (matmul.linear, F.linear)]
    assert not found and pair[0][0].dtype == torch.bfloat16
    assert all(torch.equal(*each) for each in zip(*pair))


def test_layers_keep_hooks_names_and_gradients(monkeypatch):
    x, weight, bias = tensors()
    found, seen = calls(monkeypatch), []
    layer = PrepackedLinear(WIDTH, OUT)
    layer.load_state_dict({"weight": weight, "bias": bias})
    layer.register_forward_hook(lambda *_: seen.append("forward"))
    layer.register_full_backward_hook(lambda *_: seen.append("backward"))
    layer(x.requires_grad_()).sin().sum().backward()
    expected = results(F.linear, x, weight, bias)
    for mine, theirs in zip((x.grad, layer.weight.grad, layer.bias.grad), expected[1:]):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert seen == ["forward", "backward"] and len(found) == 3


@pytest.mark.parametrize("pairs, rows", [(1, ROWS), (3, ROWS), (3, 2), (0, ROWS)])
def test_batched_products(pairs, rows, monkeypatch):
    x, y, added = (torch.randn(pairs, *shape) for shape in ((rows, WIDTH), (OUT, WIDTH), (rows, OUT)))
    found = calls(monkeypatch)
    with FlopCounterMode(display=False) as counter:
        plain, more = matmul.products(x, y), matmul.products(x, y, added.clone())
    assert len(found) == (2 * pairs if rows == ROWS else 0)
    assert counter.get_total_flops() == 2 * 2 * pairs * rows * WIDTH * OUT
    torch.testing.assert_close(plain, x @ y.transpose(1, 2), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(more, x @ y.transpose(1, 2) + added, rtol=1e-4, atol=1e-4)


def test_gradients_of_gradients(monkeypatch):
    found, grown = calls(monkeypatch), []
    for function in (matmul.linear, F.linear):
        x, weight, bias = (each.double().float().requires_grad_() for each in tensors())
        (grad,) = torch.autograd.grad(function(x, weight, bias).sin().sum(), x, create_graph=True)
        grown.append(torch.autograd.grad(grad.square().sum(), (x, weight, bias)))
    assert len(found) > 3
    for mine, theirs in zip(*grown):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


def test_batches_of_functions_take_torchs_way(monkeypatch):
    x, weight, bias = tensors((3, ROWS))
    found = calls(monkeypatch)
    ours = torch.func.vmap(torch.func.grad(lambda x: matmul.linear(x, weight, bias).sin().sum()))(x)
    theirs = torch.func.vmap(torch.func.grad(lambda x: F.linear(x, weight, bias).sin().sum()))(x)
    assert not found
    torch.testing.assert_close(ours, theirs)

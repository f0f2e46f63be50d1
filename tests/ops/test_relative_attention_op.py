"""Relative attention in pieces and in Triton against its definition, by value and by every gradient."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fairseq_adaptive.ops.relative_attention import relative_attention
from fairseq_adaptive.ops.matmul import LEAST
from fairseq_adaptive.ops.relative_attention import eager, naive

NAMES = ("queries", "keys", "values", "distances", "content_bias", "position_bias")
# heads, rows, queries, keys, width: one of each, odd, a memory, and several of Triton's blocks
SIZES = [(1, 1, 1, 1, 1), (1, 1, 1, 9, 3), (3, 2, 5, 5, 7), (2, 3, 7, 18, 16), (1, 2, 33, 50, 17)]


@pytest.fixture(autouse=True)
def small_blocks(backend, monkeypatch):
    """Several pieces and blocks in small tensors; the real size of a block takes Triton's interpreter no longer."""
    monkeypatch.setattr(eager, "BLOCK", 4)
    monkeypatch.setattr(eager, "PIECE", 100)
    if backend == "triton":
        from fairseq_adaptive.ops.relative_attention import triton

        monkeypatch.setattr(triton, "BLOCK", 16)


def inputs(heads, rows, queried, length, width, dtype=torch.float32):
    torch.manual_seed(1)
    shapes = (heads, rows, queried, width), *[(heads, rows, length, width)] * 2, (heads, length + 1, width)
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in (*shapes, *[(heads, width)] * 2)]


def results(function, tensors, *settings, factor=None):
    """The output and every gradient by name."""
    leaves = [each.detach().requires_grad_() for each in tensors]
    out = function(*leaves, *settings)
    torch.manual_seed(2)
    out.backward(torch.randn(out.shape, dtype=torch.float64).to(out.dtype) if factor is None else factor)
    return {"out": out.detach(), **{name: leaf.grad for name, leaf in zip(NAMES, leaves)}}


def check(ours, expected, rtol=2e-5, atol=2e-5):
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=rtol, atol=atol, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("window", (None, 1, 4))
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_its_definition(size, window, backend):
    tensors = inputs(*size)
    check(results(relative_attention, tensors, window), results(naive.relative_attention, tensors, window))
    with torch.no_grad():
        out, expected = (each(*tensors, window) for each in (relative_attention, naive.relative_attention))
    torch.testing.assert_close(out, expected, rtol=2e-5, atol=2e-5)


def test_definition_is_the_formula():
    queries, keys, _, distances, content_bias, position_bias = tensors = inputs(2, 1, 3, 5, 4)
    weights = naive.attention_weights(*tensors[:2], *tensors[3:], window=2)
    for head in range(2):
        for i in range(3):
            scores = {}
            for j in (1 + i, 2 + i):  # itself, and the one before; the last three of five positions ask
                by_content = (queries[head, 0, i] + content_bias[head]) @ keys[head, 0, j]
                by_position = (queries[head, 0, i] + position_bias[head]) @ distances[head, 5 - (2 + i - j)]
                scores[j] = (by_content + by_position) / 2
            expected = torch.zeros(5)
            expected[list(scores)] = torch.stack(list(scores.values())).softmax(0)
            torch.testing.assert_close(weights[head, 0, i], expected)


@pytest.mark.parametrize("backend", ["torch"], indirect=True)
@pytest.mark.parametrize("window", (None, 40))
def test_large_products_in_double_and_single_precision(window, backend, monkeypatch):
    """oneDNN's path, with real blocks and pieces; float64 takes torch's products, and has no kernel."""
    monkeypatch.undo()
    tensors = inputs(2, 3, 300, 430, 40, torch.float64)
    assert 128 * 430 * 40 > LEAST
    expected = results(naive.relative_attention, tensors, window)
    check(results(relative_attention, tensors, window), expected, rtol=1e-11, atol=1e-11)
    single = results(relative_attention, [each.float() for each in tensors], window)
    check({name: each.double() for name, each in single.items()}, expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("dropout", (0.3, 1.0))
def test_dropout_is_the_same_in_both_passes(dropout, backend):
    """With the unit matrix for values, outputs are the weights that have survived."""
    tensors = inputs(2, 3, 5, 19, 19)
    torch.manual_seed(3)
    unit = torch.eye(19).expand(2, 3, 19, 19)
    survived = relative_attention(*tensors[:2], unit, *tensors[3:], None, dropout)
    weights = naive.attention_weights(*tensors[:2], *tensors[3:])
    factors = torch.where(survived == 0, 0.0, survived / weights)
    scale = 1 / (1 - dropout) if dropout < 1 else 0.0
    torch.testing.assert_close(factors, torch.where(survived == 0, 0.0, scale), rtol=1e-4, atol=1e-4)
    share = (survived != 0).sum() / (weights != 0).sum()
    assert abs(share - (1 - dropout)) < 0.1

    def same_dropout(queries, keys, values, *others):
        return (naive.attention_weights(queries, keys, *others) * factors) @ values

    def seeded(*args):
        torch.manual_seed(3)
        return relative_attention(*args, None, dropout)

    ours, expected = results(seeded, tensors), results(same_dropout, tensors)
    check({name: torch.zeros_like(expected[name]) if each is None else each for name, each in ours.items()}, expected)
    if dropout < 1:
        assert not torch.equal(relative_attention(*tensors, None, dropout), ours["out"])


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision(dtype, backend):
    tensors = inputs(2, 2, 5, 18, 16, dtype)
    exact = results(naive.relative_attention, [each.double() for each in tensors])
    ours = results(relative_attention, tensors)
    for name, value in exact.items():
        assert ours[name].dtype == dtype
        assert (ours[name].double() - value).norm() < 8 * torch.finfo(dtype).eps * value.norm(), name


def test_autocast(backend):
    """Queries in half precision and biases in float32, as projections under autocast give them."""
    tensors = inputs(2, 2, 5, 18, 16)
    mixed = [each.bfloat16() for each in tensors[:4]] + tensors[4:]
    exact = results(naive.relative_attention, [each.double() for each in mixed])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = results(relative_attention, mixed)
    for name, value in exact.items():
        assert ours[name].dtype == (torch.float32 if "bias" in name else torch.bfloat16)
        assert (ours[name].double() - value).norm() < 8 * torch.finfo(torch.bfloat16).eps * value.norm(), name


def test_nothing_depends_on_strides_or_on_what_was_in_memory(backend, monkeypatch):
    tensors = inputs(2, 3, 5, 12, 7)
    empty = torch.empty, torch.empty_like, torch.Tensor.new_empty

    def poisoned(function):
        def call(*args, **kwargs):
            tensor = function(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return call

    expected = results(naive.relative_attention, tensors)
    strided = [torch.stack((each, torch.full_like(each, float("nan"))), -1)[..., 0] for each in tensors]
    turned = [each.transpose(0, 1).contiguous().transpose(0, 1) for each in tensors]
    for owner, function in zip((torch, torch, torch.Tensor), empty):
        monkeypatch.setattr(owner, function.__name__, poisoned(function))
    for changed in (strided, turned):
        assert not any(each.is_contiguous() for each in changed[:4])
        check(results(relative_attention, changed), expected)


@pytest.mark.parametrize("heads, rows, queried", [(2, 0, 5), (2, 3, 0), (0, 3, 5)])
def test_nothing_to_attend(heads, rows, queried, backend):
    ours = results(relative_attention, inputs(heads, rows, queried, 8, 4))
    assert ours["out"].shape == (heads, rows, queried, 4)
    assert all(ours[name].eq(0).all() for name in NAMES)


def test_hidden_keys_have_no_gradient_and_no_influence(backend):
    tensors = inputs(1, 2, 3, 9, 4)
    ours = results(relative_attention, tensors, 2)
    assert ours["keys"][:, :, :5].eq(0).all() and ours["values"][:, :, :5].eq(0).all()
    changed = [each.clone() for each in tensors]
    changed[1][:, :, :5] += 100.0
    torch.testing.assert_close(relative_attention(*changed, 2), ours["out"])


class LargestTensor(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor):
            self.elements = max(self.elements, output.numel())
        return output


@pytest.mark.parametrize("backend", ["torch"], indirect=True)
def test_scores_are_never_all_in_memory(backend):
    tensors = inputs(4, 5, 8, 16, 2)
    with LargestTensor() as largest:
        results(relative_attention, tensors)
    assert largest.elements <= 4 * 5 * 16 * 2 < 4 * 5 * 8 * 16


def test_products_are_counted(backend, monkeypatch):
    """Those of both passes, and as many on every backend, where blocks leave nothing out."""
    monkeypatch.setattr(eager, "BLOCK", 128)
    tensors = inputs(2, 3, 7, 18, 16)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        relative_attention(*tensors)
    with FlopCounterMode(display=False) as both:
        results(relative_attention, tensors)
    pairs = 2 * 3 * 7 * 16
    assert forward.get_total_flops() == 2 * pairs * (3 * 18 + 1)
    assert both.get_total_flops() == 2 * pairs * (11 * 18 + 4)

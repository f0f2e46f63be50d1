"""int8 linear maps against their definition, in which integers are multiplied as integers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.ops.int8_linear import OP, eager, int8_weights, kind, naive
from fairseq_adaptive.ops.int8_linear.eager import WAYS, Doubles, Int8Weights, OneDNN, rounded_up

EPS = 2.0**-24  # half a unit in the last place of 1


@pytest.fixture(params=WAYS, ids=lambda way: way.__name__)
def way(request, monkeypatch):
    if not request.param.there() or not eager._right(request.param):
        pytest.skip(f"this torch has no {request.param.name}, or cuts off its sums on this processor")
    monkeypatch.setattr(eager, "way", lambda: request.param)
    return request.param


def assert_as_defined(x, weight, bias):
    """Each of seven operations in float32 rounds once: sums of the weights, low / step, their product, the integer sum, its
    scale, the sum of both, and step; the bias is added last."""
    found, expected = Int8Weights(weight, bias)(x), naive.int8_linear(x, weight, bias)
    (v, scale), (q, step, low) = naive.round_weight(weight), naive.round_rows(x)
    parts = (q[:, None] * v.long()).sum(2).abs() * scale.double() * step.double()
    parts = parts + low.abs().double() * (scale * v.sum(1)).abs()
    bound = 8 * EPS * (parts + (0 if bias is None else bias.abs().double())) + 1e-30
    assert found.dtype == torch.float32 and found.shape == expected.shape
    assert ((found.double() - expected).abs() <= bound).all()


CASES = {
    "odd": (3, 5, 7),
    "one row": (1, 64, 32),
    "one input": (4, 1, 3),
    "one output": (5, 33, 1),
    "many rows": (1100, 6, 10),
    "usual": (70, 384, 130),
}


@pytest.mark.parametrize("shape", CASES.values(), ids=CASES)
@pytest.mark.parametrize("bias", (True, False))
def test_as_defined(way, shape, bias):
    rows, inputs, outputs = shape
    torch.manual_seed(1)
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs) * 0.1
    assert_as_defined(x, weight, torch.randn(outputs) if bias else None)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 70),
    st.integers(1, 70),
    st.sampled_from((-1e4, -1.0, -1e-6, 0.0, 1e-6, 1.0, 1e4)),
    st.sampled_from((1e-6, 1.0, 1e4)),
    st.integers(0, 10**6),
)
def test_any_size_and_range(rows, inputs, outputs, mean, deviation, seed):
    generator = torch.Generator().manual_seed(seed)
    x = mean + deviation * torch.randn(rows, inputs, generator=generator)
    assert_as_defined(x, torch.randn(outputs, inputs, generator=generator), None)


@pytest.mark.parametrize("value", (0.0, 2.5, -2.5))
def test_constant_rows_are_exact_but_for_the_weights(way, value):
    torch.manual_seed(1)
    x = torch.full((3, 8), value)
    weight, bias = torch.randn(5, 8), torch.randn(5)
    v, scale = naive.round_weight(weight)
    torch.testing.assert_close(Int8Weights(weight, bias)(x), x @ (v * scale[:, None]).t() + bias)


@pytest.mark.parametrize("sign", (1, -1))
def test_rows_of_one_sign(way, sign):
    torch.manual_seed(1)
    assert_as_defined(sign * (torch.rand(9, 40) + 0.1), torch.randn(12, 40), torch.randn(12))


def test_close_to_float32():
    torch.manual_seed(1)
    x, weight = torch.randn(64, 384) * torch.logspace(-3, 3, 64)[:, None], torch.randn(96, 384)
    expected = x @ weight.t()
    difference = (Int8Weights(weight)(x) - expected).norm(dim=1) / expected.norm(dim=1)
    assert difference.max() < 0.02 and difference.min() > 1e-4  # small rows as well as large ones; and it is int8


@pytest.mark.parametrize("shape", ((0, 6), (2, 0, 6), (6,), (2, 3, 6)))
def test_any_leading_dimensions(way, shape):
    torch.manual_seed(1)
    x, weights = torch.randn(shape), Int8Weights(torch.randn(4, 6), torch.randn(4))
    assert weights(x).shape == (*shape[:-1], 4)
    torch.testing.assert_close(weights(x), weights(x.reshape(-1, 6)).view(*shape[:-1], 4), rtol=0, atol=0)


def test_strided_input():
    torch.manual_seed(1)
    x, weights = torch.randn(6, 2, 9), Int8Weights(torch.randn(4, 6))
    other = x.permute(2, 1, 0)
    assert torch.equal(weights(other), weights(other.contiguous()))


@pytest.mark.parametrize("number", (float("nan"), float("inf"), float("-inf")))
def test_what_is_not_finite_stays_so_in_its_row_alone(way, number):
    torch.manual_seed(1)
    x, weights = torch.randn(4, 16), Int8Weights(torch.randn(8, 16), torch.randn(8))
    bad = x.clone()
    bad[1, 3] = number
    found = weights(bad)
    assert not found[1].isfinite().any()
    assert torch.equal(found[[0, 2, 3]], weights(x)[[0, 2, 3]])


def test_weights_that_are_not_finite(way):
    weight = torch.randn(3, 8)
    weight[0, 2], weight[2, 1] = float("nan"), float("inf")
    found = Int8Weights(weight)(torch.randn(5, 8)).isfinite()
    assert not found[:, [0, 2]].any() and found[:, 1].all()


@pytest.mark.parametrize("sizes", ((384, 1536), (96, 33)))
def test_a_row_does_not_depend_on_others(way, sizes):
    torch.manual_seed(1)
    inputs, outputs = sizes
    x, weights = torch.randn(1050, inputs), Int8Weights(torch.randn(outputs, inputs), torch.randn(outputs))
    together = weights(x)
    for rows in ([0], [1049], range(3, 20), range(1000, 1050)):
        assert torch.equal(weights(x[list(rows)]), together[list(rows)])


def test_all_ways_agree():
    ways = [each for each in WAYS if each.there() and eager._right(each)]
    if len(ways) < 2:
        pytest.skip("there is but one here")
    torch.manual_seed(1)
    q, (v, scale) = torch.randint(0, 256, (20, 100), dtype=torch.uint8), naive.round_weight(torch.randn(30, 100))
    found = torch.zeros(len(ways), 20, 30)
    for each, out in zip(ways, found):
        each(v, scale)(q, out)
    torch.testing.assert_close(found, found[:1].expand_as(found), rtol=4 * EPS, atol=0)


def test_weights_are_a_copy():
    weight, bias, x = torch.randn(4, 6), torch.randn(4), torch.randn(3, 6)
    weights = Int8Weights(weight, bias)
    before = weights(x)
    weight.zero_(), bias.zero_()
    assert torch.equal(weights(x), before)


def test_few_numbers_of_rows():
    assert [rounded_up(rows) for rows in (1, 8, 9, 64, 65, 256, 257, 1024)] == [8, 8, 16, 64, 80, 256, 320, 1024]


@pytest.fixture
def choosing():
    eager.way.cache_clear()
    yield
    eager.way.cache_clear()


class Gone(Doubles):
    there = staticmethod(lambda: False)


class Cut(Doubles):
    def __call__(self, q, out):
        super().__call__(q, out)
        out.clamp_(-300, 300)


class Broken(Doubles):
    def __init__(self, v, scale):
        raise RuntimeError("could not create a primitive")


@pytest.mark.parametrize("first", (Gone, Cut, Broken))
def test_falls_back(monkeypatch, choosing, first):
    """On a processor or a torch without right products of int8, in the end to those of float64."""
    monkeypatch.setattr(eager, "WAYS", (first, Doubles, OneDNN))
    assert eager.way() is Doubles
    monkeypatch.setattr(eager, "WAYS", (first, Doubles))
    eager.way.cache_clear()
    assert eager.way() is Doubles


def test_refuses_other_types_and_devices():
    with pytest.raises(UsageError, match="made of float32, and these weights are torch.float16"):
        int8_weights(torch.randn(4, 6).half())
    with pytest.raises(UsageError, match="runs on a CPU, and this model is on meta"):
        int8_weights(torch.empty(4, 6, device="meta"))


needs_native = pytest.mark.skipif(
    OP.obstacle("native", "cpu", torch.float32) is not None,
    reason=f"there is no native product: {OP.obstacle('native', 'cpu', torch.float32)}",
)


@needs_native
@pytest.mark.parametrize("shape", ((7, 64), (2, 3, 64), (0, 64), (64,)), ids=str)
def test_native_weights_take_any_shape(shape):
    from fairseq_adaptive.ops.int8_linear.native import NativeWeights

    torch.manual_seed(1)
    x, weight, bias = torch.randn(shape), torch.randn(48, 64) * 0.1, torch.randn(48)
    made, expected = NativeWeights(weight, bias), naive.int8_linear(x.reshape(-1, 64), weight, bias).float()
    weight.zero_(), bias.zero_()  # they are copied
    torch.testing.assert_close(made(x), expected.view(*shape[:-1], 48), rtol=1e-5, atol=1e-5)
    if x.dim() == 2:
        strided = x.t().contiguous().t()
        assert torch.equal(made(strided), made(x))


@needs_native
def test_which_product_runs(monkeypatch):
    from fairseq_adaptive.ops.encoder_layer import native
    from fairseq_adaptive.ops.int8_linear import _kind
    from fairseq_adaptive.ops.int8_linear.native import NativeWeights

    monkeypatch.delenv("FAIRSEQ_ADAPTIVE_KERNELS", raising=False)
    x, weight = torch.randn(5, 64), torch.randn(48, 64)
    assert kind(x, weight) is NativeWeights
    for odd in (torch.randn(48, 60), torch.randn(50, 64)):
        assert kind(x[:, : odd.size(1)], odd) is Int8Weights
    assert kind(x.double(), weight) is kind(x.bfloat16(), weight) is Int8Weights
    with FlopCounterMode(display=False):
        assert kind(x, weight) is Int8Weights
    monkeypatch.setenv("FAIRSEQ_ADAPTIVE_KERNELS", "torch")
    assert kind(x, weight) is Int8Weights
    _kind.cache_clear()
    monkeypatch.setattr(native, "slower", lambda width, hidden, rows, threads, small: small and rows > 3)
    monkeypatch.setenv("FAIRSEQ_ADAPTIVE_KERNELS", "auto")
    assert kind(x, weight) is Int8Weights and kind(x[:3], weight) is NativeWeights
    monkeypatch.setenv("FAIRSEQ_ADAPTIVE_KERNELS", "native")
    assert kind(x, weight) is NativeWeights
    _kind.cache_clear()

"""A layer in C against its definition: sizes that fit no vector, empty sentences, int8, rows that are not numbers."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_adaptive.ops.decoder_step import Int8Map, Layer, Map, Norm, Stack
from fairseq_adaptive.ops.decoder_step.packing import linear as product
from fairseq_adaptive.ops.encoder_layer import OP, Predictor, naive, native
from fairseq_adaptive.ops.int8_linear.naive import int8_linear, round_rows, round_weight

pytestmark = pytest.mark.skipif(
    OP.obstacle("native", "cpu", torch.float32) is not None,
    reason=f"the library is not there: {OP.obstacle('native', 'cpu', torch.float32)}",
)
SIZES = [(24, 2, 20), (15, 3, 7), (13, 1, 1), (1, 1, 3), (64, 4, 96), (144, 4, 33), (384, 12, 200)]
WHOLE = [(16, 1, 16), (64, 4, 96), (384, 12, 208)]  # of whole vectors, as int8 wants them
LENGTHS = [7, 0, 1, 13, 102, 0]


def draw(generator, *sizes, scale=1.0):
    return torch.randn(*sizes, generator=generator) * scale


def linear(generator, outer, inner, kind=Map, bias=True):
    return kind(draw(generator, outer, inner, scale=inner**-0.5), draw(generator, outer, scale=0.1) if bias else None)


def norm(generator, width):
    return Norm(1 + draw(generator, width, scale=0.2), draw(generator, width, scale=0.2), 1e-5)


def stack(width, heads, hidden, kind=Map, seed=1, pre_norm=True, activation="gelu", bias=True, omega=False):
    g = torch.Generator().manual_seed(seed)
    sizes = (3 * width, width), (width, width), (hidden, width), (width, hidden)
    layer = Layer((norm(g, width), None, norm(g, width)), *(linear(g, *each, kind, bias) for each in sizes))
    omega = 1 + draw(g, 2, 2, width, scale=0.3) if omega else None
    return Stack([layer], [0, 0], heads, pre_norm, activation, omega)


def predictor(width, kind=Map, seed=1, bias=True):
    g = torch.Generator().manual_seed(seed)
    return Predictor(norm(g, width), linear(g, width, width, kind), norm(g, width), linear(g, 2, width, bias=bias))


def assert_as_defined(made, x, lengths, depth=0, tolerance=1e-5):
    before = x.clone()
    found = native.PackedLayer(made)(x, lengths, depth)
    expected = naive.encoder_layer(made, x, [length for length in lengths if length], depth)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(x, before)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("pre_norm", (True, False), ids=("pre", "post"))
@pytest.mark.parametrize("activation", ("relu", "gelu"))
def test_sizes(sizes, pre_norm, activation):
    x = torch.randn(sum(LENGTHS), sizes[0], generator=torch.Generator().manual_seed(1))
    made = stack(*sizes, pre_norm=pre_norm, activation=activation, bias=pre_norm, omega=not pre_norm)
    tolerance = 1e-5 if sizes[0] > 1 else 1e-3  # a norm of one number is its bias, whatever rounding makes of 0
    for depth in (0, 1):
        assert_as_defined(made, x, LENGTHS, depth, tolerance)


def test_no_rows():
    made = native.PackedLayer(stack(24, 2, 20))
    assert made(torch.zeros(0, 24), [0, 0]).shape == (0, 24) and made(torch.zeros(0, 24), []).shape == (0, 24)
    assert native.PackedPredictor(predictor(24))(torch.zeros(0, 24)).shape == (0, 2)


def test_lengths_that_are_not_those_of_the_rows_are_refused():
    made = native.PackedLayer(stack(24, 2, 20))
    for lengths in ([3, 3], [5, 4], [8, -1], []):
        with pytest.raises(ValueError, match="sentences of"):
            made(torch.zeros(7, 24), lengths)


@given(
    st.integers(1, 40),
    st.integers(1, 4),
    st.integers(1, 70),
    st.lists(st.integers(0, 40), min_size=1, max_size=5),
    st.booleans(),
    st.sampled_from(("relu", "gelu")),
    st.integers(0, 10**6),
)
@settings(max_examples=40, deadline=None)
def test_random_cases(head, heads, hidden, lengths, pre_norm, activation, seed):
    lengths = [*lengths, 1]
    x = torch.randn(sum(lengths), head * heads, generator=torch.Generator().manual_seed(seed))
    made = stack(head * heads, heads, hidden, seed=seed, pre_norm=pre_norm, activation=activation)
    # a norm over a few numbers that are nearly equal divides rounding by next to nothing
    assert_as_defined(made, x, lengths, tolerance=1e-4 if head * heads > 3 else 1e-2)


@pytest.mark.parametrize("scale", (1e-3, 1.0, 30.0))
def test_scores_far_apart(scale):
    """A softmax of which all but one weight is 0, and one of equal weights."""
    x = scale * torch.randn(40, 64, generator=torch.Generator().manual_seed(1))
    made = stack(64, 4, 96)
    layer = made.layers[0]
    made = made._replace(layers=[layer._replace(qkv=Map(layer.qkv.weight * scale, layer.qkv.bias))])
    assert_as_defined(made, x, [17, 23], tolerance=1e-4)


@pytest.mark.parametrize("value", (math.nan, math.inf, -math.inf))
@pytest.mark.parametrize("kind", (Map, Int8Map))
def test_what_is_not_finite_stays_in_its_sentence(value, kind):
    x = torch.randn(30, 64, generator=torch.Generator().manual_seed(1))
    made = native.PackedLayer(stack(64, 4, 96, kind))
    expected = made(x, [10, 12, 8])
    x[15, 3] = value
    found = made(x, [10, 12, 8])
    assert found[10:22].isnan().all()
    assert torch.equal(found[:10], expected[:10]) and torch.equal(found[22:], expected[22:])
    scores = native.PackedPredictor(predictor(64, kind))(x)
    assert scores[15].isnan().all() and scores.isfinite().all(1).sum() == 29


@pytest.mark.parametrize("kind", (Map, Int8Map))
def test_a_sentence_does_not_depend_on_others(kind):
    """Bit by bit, whatever the number of rows is that a tile or a block takes."""
    made, scores = native.PackedLayer(stack(48, 3, 64, kind)), native.PackedPredictor(predictor(48, kind))
    generator = torch.Generator().manual_seed(1)
    lengths = [1, 2, 3, 5, 8, 13, 21, 34, 55, 90]
    x = torch.randn(sum(lengths), 48, generator=generator)
    alone = [made(each.clone(), [len(each)]) for each in x.split(lengths)]
    assert torch.equal(torch.cat(alone), made(x, lengths))
    order = torch.randperm(len(lengths), generator=generator).tolist()
    shuffled = made(torch.cat([x.split(lengths)[number] for number in order]), [lengths[number] for number in order])
    assert torch.equal(torch.cat([alone[number] for number in order]), shuffled)
    together = scores(x)
    for count in range(1, 20):
        assert torch.equal(scores(x[:count].clone()), together[:count])


@pytest.mark.parametrize("sizes", WHOLE, ids=str)
@pytest.mark.parametrize("pre_norm", (True, False), ids=("pre", "post"))
def test_int8(sizes, pre_norm):
    """Each map is the definition's, of the input that it has; behind several maps a number that lies between two steps may
    fall to the other one, which moves a state by some hundredths."""
    x = torch.randn(sum(LENGTHS), sizes[0], generator=torch.Generator().manual_seed(1))
    made = stack(*sizes, Int8Map, pre_norm=pre_norm)
    found = native.PackedLayer(made)(x, LENGTHS)
    expected = naive.encoder_layer(made, x, [length for length in LENGTHS if length])
    plain = naive.encoder_layer(stack(*sizes, pre_norm=pre_norm), x, [length for length in LENGTHS if length])
    apart = (found - expected).norm() / expected.norm()
    assert apart < 2e-3 and apart < 0.3 * (plain - expected).norm() / expected.norm()
    assert ((found - expected).abs() < 1e-4).float().mean() > 0.8


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 120),
    st.integers(1, 5),
    st.integers(1, 9),
    st.sampled_from((-1e4, -1.0, -1e-6, 0.0, 1e-6, 1.0, 1e4)),
    st.sampled_from((0.0, 1e-6, 1.0, 1e4)),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_a_map_of_int8(rows, inner, outer, mean, deviation, bias, seed):
    """To the rounding of float32, with the bound of ``test_int8_linear.py``."""
    packing = native.Packing(native.library())
    inner, outer = inner * packing.lanes, outer * packing.lanes
    generator = torch.Generator().manual_seed(seed)
    x = mean + deviation * torch.randn(rows, inner, generator=generator)
    weight = torch.randn(outer, inner, generator=generator)
    bias = torch.randn(outer, generator=generator) if bias else None
    found, expected = product(packing, Int8Map(weight, bias), x), int8_linear(x, weight, bias)
    (v, scale), (q, step, low) = round_weight(weight), round_rows(x)
    parts = (q.double() @ v.double().t()).abs() * scale.double() * step.double()
    parts = parts + low.abs().double() * (scale * v.sum(1)).abs()
    bound = 8 * 2.0**-24 * (parts + (0 if bias is None else bias.abs().double())) + 1e-30
    assert ((found.double() - expected).abs() <= bound).all()


def test_the_largest_sums_of_int8():
    packing = native.Packing(native.library())
    inner = 64 * packing.lanes
    x, weight = torch.ones(3, inner), torch.ones(packing.lanes, inner)
    x[:, 0], weight[1] = 0, -1
    torch.testing.assert_close(product(packing, Int8Map(weight, None), x), int8_linear(x, weight).float())


@pytest.mark.parametrize("width", (1, 13, 24, 64, 384))
@pytest.mark.parametrize("rows", (1, 7, 200))
def test_predictor(width, rows):
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(1))
    made = predictor(width, bias=rows > 1)
    tolerance = 1e-5 if width > 1 else 1e-3
    torch.testing.assert_close(native.PackedPredictor(made)(x), made(x), rtol=tolerance, atol=tolerance)
    if native.small_obstacle(width) is None:
        made = predictor(width, Int8Map)
        torch.testing.assert_close(native.PackedPredictor(made)(x), made(x), rtol=0.02, atol=0.02)


def test_several_threads_at_once():
    made, generator = native.PackedLayer(stack(64, 4, 96)), torch.Generator().manual_seed(1)
    texts = torch.randn(8, 33, 64, generator=generator)
    expected, start = [made(each, [33]) for each in texts], threading.Barrier(8)
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            found = list(pool.map(lambda each: (start.wait(), made(each, [33]))[1], texts))
            assert all(map(torch.equal, found, expected))


def test_weights_are_copied():
    made = stack(24, 2, 20)
    packed, x = native.PackedLayer(made), torch.randn(5, 24, generator=torch.Generator().manual_seed(1))
    expected = packed(x, [5])
    for each in made.layers[0][1:5]:
        each.weight.zero_()
    made.layers[0].norms[0].gain.zero_()
    assert torch.equal(packed(x, [5]), expected)


def test_many_rows_go_to_who_is_faster(monkeypatch):
    asked = []
    native.slower.cache_clear()
    monkeypatch.setattr(
        native, "speeds", lambda *sizes: asked.append(sizes) or (10.0, 11.9 if sizes[2] < 512 else 12.1)
    )
    assert not native.slower(128, 256, 320, 1) and not asked
    assert not native.slower(512, 2048, 320, 1) and asked == [(512, 2048, 256, 1, False)]
    assert native.slower(512, 2048, 640, 4, True) and asked[1:] == [(512, 2048, 512, 4, True)]
    native.slower.cache_clear()
    monkeypatch.undo()
    assert all(0.01 < each < 10000 for each in native.speeds(64, 128, 32, 1, False))
    assert all(0.01 < each < 10000 for each in native.speeds(64, 128, 32, 1, True))

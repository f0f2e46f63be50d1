"""A step in C against its definition: sizes that fit no vector, every rule, beams that are not full, threads."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_adaptive.ops.decoder_step import (
    OP,
    Asked,
    Decoder,
    Halting,
    Int8Map,
    Layer,
    Map,
    Norm,
    Stack,
    naive,
    native,
)

pytestmark = pytest.mark.skipif(
    OP.obstacle("native", "cpu", torch.float32) is not None,
    reason=f"the library is not there: {OP.obstacle('native', 'cpu', torch.float32)}",
)
WORDS = 71


def stack(generator, width, heads, hidden, source=None, layers=2, depths=3, **options):
    def draw(*sizes, scale=1.0):
        return torch.randn(*sizes, generator=generator) * scale

    def linear(outer, inner):
        return Map(draw(outer, inner, scale=inner**-0.5), draw(outer, scale=0.1))

    def norm():
        return Norm(1 + draw(width, scale=0.2), draw(width, scale=0.2), 1e-5)

    def layer():
        cross = {}
        if source:
            cross = {"query": linear(width, width), "source": linear(2 * width, source)}
            cross["merge_source"] = linear(width, width)
        maps = linear(3 * width, width), linear(width, width), linear(hidden, width), linear(width, hidden)
        return Layer((norm(), norm() if source else None, norm()), *maps, **cross)

    schedule = [depth % layers for depth in range(depths)]
    options = {"pre_norm": True, "activation": "relu", **options}
    if options.pop("admin", False):
        options["omega"] = 1 + draw(depths, 3 if source else 2, width, scale=0.3)
    return Stack(
        [layer() for _ in range(layers)], schedule, heads, last=norm() if options["pre_norm"] else None, **options
    )


def decoder(seed=1, width=24, heads=2, hidden=20, source=12, rule="none", embedding_norm=False, **options):
    generator = torch.Generator().manual_seed(seed)
    made = stack(generator, width, heads, hidden, source, **options)
    embedding, words = (torch.randn(WORDS, width, generator=generator) for _ in range(2))
    norm = Norm(torch.ones(width), torch.zeros(width), 1e-5) if embedding_norm else None
    thresholds = {"act": 0.9, "ut_act": 0.9, "pondernet": 0.5, "saturation": 0.8, "margin": 0.3}
    unit = torch.randn(width, generator=generator) * 0.4
    halting = Halting(rule, thresholds[rule], unit, -0.5) if rule != "none" else Halting()
    return Decoder(made, embedding, 0.7, words, norm, halting)


def searches(made, lengths, generator, threads=1):
    layer = made.stack.layers[0]
    states = None
    if layer.source is not None:
        states = torch.randn(sum(lengths), layer.source.weight.size(1), generator=generator)
    return naive.Search(made, lengths, states), native.Search(native.Packed(made), lengths, states, threads)


def run(made, lengths, beam=3, steps=4, threads=1, seed=2, tolerance=1e-5, **asked):
    """Let both decode the same, sentences that end on the way and rows in any order among them."""
    generator = torch.Generator().manual_seed(seed)
    ours = searches(made, lengths, generator, threads)
    sentences, order, rows = len(lengths), None, 1
    tokens, scores = torch.full((sentences,), 2), torch.zeros(sentences)
    for step in range(steps):
        position = torch.randn(made.embedding.size(1), generator=generator) if step % 2 else None
        question = Asked(tokens, scores, order, rows, position, 2 * beam, **asked)
        (best, words, origin), (found, *theirs) = (each.step(question) for each in ours)
        torch.testing.assert_close(found, best, rtol=tolerance, atol=tolerance)
        apart = best.diff().abs().gt(1e-4)  # what is nearly equal may come in any order
        end = torch.ones(sentences, 1, dtype=torch.bool)
        real = best.isfinite() & torch.cat((end, apart), 1) & torch.cat((apart, end), 1)
        assert torch.equal(theirs[0][real], words[real]) and torch.equal(theirs[1][real], origin[real])
        kept = torch.randperm(sentences, generator=generator)[: max(1, sentences - step % 2)]
        sentences, chosen = len(kept), torch.rand(len(kept), 2 * beam, generator=generator).argsort(1)[:, :beam]
        order, tokens = (each[kept].gather(1, chosen).flatten() for each in (origin, words))
        scores, rows = best[kept].gather(1, chosen).flatten(), beam
    ours[1].close()


SIZES = [
    {"width": 24, "heads": 2},
    {"width": 64, "heads": 4, "hidden": 96, "source": 64},
    {"width": 15, "heads": 3, "hidden": 7, "source": 9},
    {"width": 13, "heads": 1, "hidden": 1, "source": 1, "layers": 1},
    {"width": 144, "heads": 4, "hidden": 33, "source": None},
]


@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: f"C{sizes['width']}-H{sizes['heads']}")
@pytest.mark.parametrize("pre_norm", (True, False), ids=("pre", "post"))
@pytest.mark.parametrize("activation", ("relu", "gelu"))
def test_sizes(sizes, pre_norm, activation):
    made = decoder(pre_norm=pre_norm, activation=activation, admin=not pre_norm, embedding_norm=pre_norm, **sizes)
    run(made, [5, 1, 8, 3])


@pytest.mark.parametrize("rule", naive.RULES[1:])
@pytest.mark.parametrize("pre_norm", (True, False), ids=("pre", "post"))
def test_halting(rule, pre_norm):
    for seed in range(3):
        run(decoder(seed, rule=rule, pre_norm=pre_norm, depths=6, layers=2, width=40), [5, 2, 8], seed=seed)


def in_int8(made):
    layers = [Layer(*(Int8Map(*each) if type(each) is Map else each for each in layer)) for layer in made.stack.layers]
    return made._replace(stack=made.stack._replace(layers=layers), small_words=True)


@pytest.mark.parametrize("rule", naive.RULES)
@pytest.mark.parametrize("pre_norm", (True, False), ids=("pre", "post"))
def test_int8(rule, pre_norm):
    """A number that lies between two steps may fall to the other one, which moves a state by some hundredths: most scores are
    those of the definition, and all are nearer to them than to those of float32."""
    sizes = {"width": 64, "heads": 4, "hidden": 96, "source": 64, "depths": 4}
    plain, generator = decoder(rule=rule, pre_norm=pre_norm, **sizes), torch.Generator().manual_seed(1)
    made, states = in_int8(plain), torch.randn(14, 64, generator=generator)
    lengths, tokens = [5, 1, 8], torch.randint(0, WORDS, (3,), generator=generator)
    asked = Asked(tokens, torch.zeros(3), None, 1, None, WORDS)
    scores = []
    for search in (
        naive.Search(plain, lengths, states),
        naive.Search(made, lengths, states),
        native.Search(native.Packed(made), lengths, states),
    ):
        best, words, _ = search.step(asked)
        scores.append(best.gather(1, words.argsort(1)))  # by word
    plain, expected, found = scores
    assert (found - expected).norm() < 0.3 * (found - plain).norm()
    assert ((found - expected).abs() < 1e-3).float().mean() > 0.6


@given(
    st.integers(1, 40),
    st.integers(1, 4),
    st.integers(1, 40),
    st.integers(0, 30),
    st.lists(st.integers(1, 12), min_size=1, max_size=4),
    st.sampled_from((1, 2, 5, 37)),
    st.integers(1, 3),
    st.sampled_from(naive.RULES),
)
@settings(max_examples=25, deadline=None)
def test_random_cases(head, heads, hidden, source, lengths, beam, threads, rule):
    made = decoder(3, head * heads, heads, hidden, source or None, rule)
    # a norm over a few numbers that are nearly equal divides rounding by next to nothing
    run(made, lengths, beam, steps=3, threads=threads, tolerance=1e-4)


@pytest.mark.parametrize(
    "asked",
    [
        {"only": 2},
        {"only": 2, "changes": {2: -math.inf}},
        {"changes": {1: -math.inf, 3: -2.5, 70: 4.0, 64: -math.inf}},
        {"heat": 0.01},
        {"heat": 3.0, "changes": {0: -math.inf}},
    ],
    ids=str,
)
def test_what_a_step_is_asked(asked):
    run(decoder(), [5, 1, 8], **asked)


def test_many_words(monkeypatch):
    monkeypatch.setattr(f"{__name__}.WORDS", 1500)
    run(decoder(width=32), [5, 1, 8], beam=5)


def test_rows_that_are_not_numbers():
    """They have no continuations, and neither do their sentences where there is no other row."""
    made = decoder()
    made.embedding[7], made.words[9, 3] = math.nan, math.inf
    ours = searches(made, [3, 2], torch.Generator().manual_seed(1))[1]
    best, words, rows = ours.step(Asked(torch.tensor([7, 2]), torch.zeros(2), None, 1, None, 4))
    assert best.eq(-math.inf).all() and words.eq(0).all() and rows.tolist() == [[0] * 4, [1] * 4]
    made.words[9, 3] = 0
    both = searches(made, [3, 2], torch.Generator().manual_seed(1))
    for tokens, order, beam in (
        (torch.tensor([2, 2]), None, 1),
        (torch.tensor([7, 2, 7, 7]), torch.tensor([0, 0, 1, 1]), 2),
    ):
        asked = Asked(tokens, torch.zeros(len(tokens)), order, beam, None, 4)
        (best, words, rows), (found, *theirs) = (each.step(asked) for each in both)
        torch.testing.assert_close(found, best, rtol=1e-5, atol=1e-5)
        assert torch.equal(theirs[1], rows) and torch.equal(theirs[0], words)
    assert rows[0].eq(1).all() and best[1].eq(-math.inf).all()


@pytest.mark.parametrize("pre_norm", (True, False), ids=("pre", "post"))
@pytest.mark.parametrize("threads", (1, 3))
def test_encode(pre_norm, threads):
    generator = torch.Generator().manual_seed(1)
    for width, heads, hidden in ((24, 2, 20), (15, 3, 7), (64, 4, 128)):
        made = stack(generator, width, heads, hidden, pre_norm=pre_norm, admin=not pre_norm)
        x, lengths = torch.randn(21, width, generator=generator), [7, 1, 13]
        given = x.clone()
        found = native.encode(native.Packed(made), x, lengths, threads)
        torch.testing.assert_close(found, naive.encode(made, x, lengths), rtol=1e-5, atol=1e-5)
        assert torch.equal(x, given)


def test_a_row_does_not_depend_on_others():
    """Bit by bit, whatever the number of rows is that a tile takes."""
    made = native.Packed(decoder(width=40, hidden=56, rule="act"))
    generator = torch.Generator().manual_seed(1)
    states, tokens = torch.randn(17, 3, 12, generator=generator), torch.randint(0, WORDS, (17,), generator=generator)
    together = native.Search(made, [3] * 17, states.flatten(0, 1))
    asked = Asked(tokens, torch.zeros(17), None, 1, None, 6)
    expected = [each.clone() for each in together.step(asked)]
    for count in range(1, 17):
        some = native.Search(made, [3] * count, states[:count].flatten(0, 1))
        found = some.step(asked._replace(tokens=tokens[:count], scores=torch.zeros(count)))
        assert all(torch.equal(one, other[:count]) for one, other in zip(found, expected))


def test_several_threads_at_once():
    """Searches share the weights that are laid out and nothing else."""
    made = native.Packed(decoder(rule="ut_act"))
    states = torch.randn(8, 6, 12, generator=torch.Generator().manual_seed(1))

    def ask(number):
        found, tokens, order = [], torch.tensor([number]), None
        search = native.Search(made, [6], states[number])
        for _ in range(6):
            best, words, rows = search.step(Asked(tokens, torch.zeros(len(tokens)), order, len(tokens), None, 4))
            tokens, order = words[0], rows[0]
            found.append(best)
        search.close()
        return torch.stack([*found])

    expected, start = [ask(number) for number in range(8)], threading.Barrier(8)
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            found = list(pool.map(lambda number: (start.wait(), ask(number))[1], range(8)))
            assert all(map(torch.equal, found, expected))


def test_what_makes_no_sense_is_refused():
    made = native.Packed(decoder())
    with pytest.raises(ValueError, match="states of the source"):
        native.Search(made, [3])
    with pytest.raises(ValueError, match="states of the source"):
        native.Search(native.Packed(decoder(source=None)), [3], torch.zeros(3, 12))
    for token in (-1, WORDS):
        with pytest.raises(IndexError, match="none of 71 words"):
            native.Search(made, [1], torch.zeros(1, 12)).step(
                Asked(torch.tensor([token]), torch.zeros(1), None, 1, None, 2)
            )


def test_large_steps_go_to_who_is_faster(monkeypatch):
    asked = []
    monkeypatch.setattr(
        native, "speeds", lambda *sizes: asked.append(sizes) or (10.0, 11.9 if sizes[2] < 512 else 12.1)
    )
    assert native.slower(128, 256, 320) is None and not asked
    assert native.slower(512, 2048, 320) is None and asked == [(512, 2048, 256, torch.get_num_threads(), False)]
    assert native.slower(512, 2048, 640) == (
        "torch multiplies 512 rows of 512 by 2048 faster on this machine: 12 GFLOP/s for 10"
    )
    monkeypatch.undo()
    assert all(0.01 < each < 10000 for each in native.speeds(64, 128, 32, 1))


def test_a_product_of_no_whole_vectors_is_measured_within_its_memory(monkeypatch):
    """A vocabulary is a multiple of 8, and a vector may have 16 numbers."""
    written = []
    made = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args: written.append(args[1:]) or made(*args))
    native.speeds.__wrapped__(16, 37, 5, 1)
    lanes = native.library().lanes()
    assert (5, -(-37 // lanes) * lanes) in written

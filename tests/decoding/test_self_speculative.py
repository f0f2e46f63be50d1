"""Self-speculative decoding says what greedy search says, whatever the depths that draft would say."""

import logging

import pytest
import torch

from fairseq_adaptive.decoding.pace import Pace
from fairseq_adaptive.decoding.speculative_generator import SpeculativeGenerator
from fairseq_adaptive.decoding.torch_rounds import accept, truncated
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules.layers.known import say_once
from fairseq_adaptive.ops.decoder_step import OP
from searches import MODELS, PRE_LN, TINY, assert_same, halting, search, shared

KERNELS = "FAIRSEQ_ADAPTIVE_KERNELS"
needs_native = pytest.mark.skipif(
    OP.obstacle("native", "cpu", torch.float32) is not None,
    reason=f"the library is not there: {OP.obstacle('native', 'cpu', torch.float32)}",
)
BACKENDS = [pytest.param("native", marks=needs_native), "torch"]
FIT = [flags for flags in MODELS if not {"adaptive_softmax_cutoff", "decoder_input_dim"} & set(flags)]


def assert_equal(ours, theirs):
    """Bit by bit."""
    assert len(ours) == len(theirs)
    for our, their in zip(sum(ours, []), sum(theirs, [])):
        assert our["tokens"].tolist() == their["tokens"].tolist()
        assert torch.equal(our["score"], their["score"])
        assert torch.equal(our["positional_scores"], their["positional_scores"])


@pytest.fixture
def made(monkeypatch):
    """The generators that searches make."""
    made, start = [], SpeculativeGenerator.__init__
    monkeypatch.setattr(
        SpeculativeGenerator, "__init__", lambda self, *a, **k: (start(self, *a, **k), made.append(self))[0]
    )
    return made


def many(batch, rows=23):
    """Sentences that differ."""
    batch = {name: value.repeat(8, *[1] * (value.dim() - 1))[:rows] for name, value in batch.items()}
    source, generator = batch["src_tokens"], torch.Generator().manual_seed(1)
    words = torch.randint(4, 44, source.shape, generator=generator)
    batch["src_tokens"] = torch.where(source > 3, words, source)
    return batch


def ending(model, dictionary, batch):
    """A model of random weights whose greedy hypotheses end at many places: the word that is said first at most of them
    becomes the end."""
    weight = model.decoder.output_projection.weight.data
    model.decoder.output_projection.weight = torch.nn.Parameter(weight.clone())  # tied no more
    found = [each[0]["tokens"].tolist() for each in search([model], dictionary, batch, beam=1, min_len=24)]
    places = {word: len({each.index(word) for each in found if word in each}) for word in range(4, 44)}
    best = max(places, key=places.get)
    model.decoder.output_projection.weight.data[[2, best]] = weight[[best, 2]]
    return model


@needs_native
@pytest.mark.parametrize("flags", FIT, ids=lambda flags: "-".join(flags) or "plain")
@pytest.mark.parametrize("exit, draft", [(1, 2), (3, 5)])
def test_equals_greedy_bit_by_bit(build, batch, dictionary, flags, exit, draft, monkeypatch, made):
    monkeypatch.setenv(KERNELS, "native")
    batch = many(batch)
    model = ending(shared(build, dtype=torch.float32, **flags), dictionary, batch)
    theirs = search([model], dictionary, batch, beam=1)
    assert len({len(each["tokens"]) for found in theirs for each in found}) > 1
    assert_equal(search([model], dictionary, batch, beam=1, self_speculative=exit, draft=draft), theirs)
    assert made[0].tally.rounds


@pytest.mark.parametrize("flags", MODELS, ids=lambda flags: "-".join(flags) or "plain")
def test_equals_greedy_in_torch(build, batch, dictionary, flags, monkeypatch, made):
    monkeypatch.setenv(KERNELS, "torch")
    batch, exit, draft = many(batch, 5), 2, 3
    model = shared(build, **flags)
    model = model if "adaptive_softmax_cutoff" in flags else ending(model, dictionary, batch)
    theirs = search([model], dictionary, batch, beam=1)
    assert_same(search([model], dictionary, batch, beam=1, self_speculative=exit, draft=draft), theirs)
    assert made[0].tally.rounds


@needs_native
@pytest.mark.parametrize("rule", ("act", "ut_act", "pondernet", "saturation", "margin"))
def test_halting_models_bit_by_bit(build, batch, dictionary, rule, monkeypatch, made):
    monkeypatch.setenv(KERNELS, "native")
    batch, exit = many(batch), 2
    model = ending(halting(build, rule, dtype=torch.float32, **PRE_LN), dictionary, batch)
    theirs = search([model], dictionary, batch, beam=1)
    assert_equal(search([model], dictionary, batch, beam=1, self_speculative=exit, draft=3), theirs)
    assert made[0].tally.acceptance > 0


OPTIONS = [
    {"unnormalized": True},
    {"min_len": 6, "lenpen": 0.3},
    {"min_len": 0, "unkpen": 2.0, "temperature": 1.5},
    {"max_len_b": 5},
    {"max_len_b": 1},
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options))
def test_options(build, batch, dictionary, options, backend, monkeypatch):
    monkeypatch.setenv(KERNELS, backend)
    batch = many(batch, 9)
    model = ending(shared(build, dtype=torch.float32), dictionary, batch)
    theirs = search([model], dictionary, batch, beam=1, **options)
    assert_same(search([model], dictionary, batch, beam=1, self_speculative=2, draft=4, **options), theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_prefix_is_said_first(build, batch, dictionary, backend, monkeypatch, made):
    """Also of another length in each sentence; with fairseq's own search, since ours takes no prefix."""
    batch, pad = many(batch), dictionary.pad()
    model = ending(shared(build, dtype=torch.float32), dictionary, batch)
    prefix = torch.randint(4, 44, (23, 3), generator=torch.Generator().manual_seed(4))
    prefix[::3, 2], prefix[::6, 1] = pad, pad
    theirs = search([model], dictionary, batch, beam=1, prefix_tokens=prefix)
    monkeypatch.setenv(KERNELS, backend)
    ours = search([model], dictionary, batch, beam=1, prefix_tokens=prefix, self_speculative=2, draft=4)
    assert_same(ours, theirs)
    assert made[0].tally.rounds
    assert ours[1][0]["tokens"][:3].tolist() == prefix[1].tolist()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sentence_is_the_same_alone(build, batch, dictionary, backend, monkeypatch):
    monkeypatch.setenv(KERNELS, backend)
    batch = many(batch, 6)
    model = ending(shared(build, dtype=torch.float32), dictionary, batch)
    together = search([model], dictionary, batch, beam=1, self_speculative=2)
    for row in range(6):
        one = {name: value[row : row + 1] for name, value in batch.items()}
        assert_same(search([model], dictionary, one, beam=1, self_speculative=2), together[row : row + 1])


def test_language_models(build, dictionary, monkeypatch, made):
    """A language model goes on with what it is given, as fairseq's task asks it to."""
    sizes = {name: value for name, value in TINY.items() if name.startswith("decoder_")}
    widths = {"decoder_input_dim": 16, "decoder_output_dim": 16}
    model = build("shared_transformer_lm", dtype=torch.float32, **sizes, **widths)
    model.decoder.output_projection.weight.data *= 3
    source = torch.randint(4, 44, (7, 4), generator=torch.Generator().manual_seed(4))
    source[::2, 3] = dictionary.pad()
    batch = {"src_tokens": source, "src_lengths": source.ne(1).sum(1), "prev_output_tokens": source}
    theirs = search([model], dictionary, batch, beam=1, prefix_tokens=source)
    for backend in ("native", "torch") if OP.obstacle("native", "cpu", torch.float32) is None else ("torch",):
        monkeypatch.setenv(KERNELS, backend)
        ours = search([model], dictionary, batch, beam=1, prefix_tokens=source, self_speculative=2)
        assert_same(ours, theirs)
    assert all(each.tally.rounds for each in made)


def test_sampling_draws_from_the_distribution_of_all_depths(build, batch, dictionary, made):
    """The words of 1,000 samples against the probabilities of the model: the first, and the second behind the first."""
    rows, model = 1000, shared(build, dtype=torch.float32)
    batch = {name: value[:1].expand(rows, *value.shape[1:]) for name, value in batch.items()}
    flags = {"beam": 1, "max_len_b": 2, "sampling": True, "sampling_topk": 6}
    found = search([model], dictionary, batch, self_speculative=1, draft=2, **flags)
    drawn = torch.stack([torch.nn.functional.pad(each[0]["tokens"], (0, 1))[:2] for each in found])
    assert 0.05 < made[0].tally.acceptance < 0.9
    word = int(drawn[:, 0].mode().values)
    for previous, seen in (([2], drawn[:, 0]), ([2, word], drawn[drawn[:, 0] == word, 1])):
        source = {name: value[:1] for name, value in batch.items() if name != "prev_output_tokens"}
        logits = model(**source, prev_output_tokens=torch.tensor([previous]))[0][0, -1]
        logits[1] = -torch.inf
        logits[2] = -torch.inf if len(previous) == 1 else logits[2]
        best, index = logits.log_softmax(-1).exp().topk(6)
        expected = torch.zeros(48).scatter(0, index, best / best.sum())
        share = torch.bincount(seen, minlength=48) / len(seen)
        spread = (expected * (1 - expected) / len(seen)).sqrt()
        assert ((share - expected).abs() <= 4 * spread + 1e-9).all()
    assert torch.allclose(found[0][0]["positional_scores"].sum(), found[0][0]["score"] * len(found[0][0]["tokens"]))


@pytest.mark.parametrize("top", ({}, {"top_k": 3}, {"top_p": 0.6}), ids=str)
def test_what_is_accepted_has_the_distribution_of_the_target(top):
    torch.manual_seed(0)
    target, draft = (truncated(torch.randn(3, 5).double().log_softmax(-1), **top) for _ in range(2))
    words = [accept(torch.multinomial(draft[:2], 1).squeeze(1), draft[:2], target) for _ in range(4000)]
    for place in range(3):
        seen = torch.tensor([int(each[place]) for each in words if len(each) > place])
        share, expected = torch.bincount(seen, minlength=5) / len(seen), target[place]
        assert ((share - expected).abs() <= 4 * (expected * (1 - expected) / len(seen)).sqrt() + 1e-9).all()


REFUSED = [
    ({"beam": 2}, "not for 2: add --beam 1"),
    ({"beam": 1, "self_speculative": 5}, "leaves no depth to verify with: the decoder has 5, give 1 to 4"),
    ({"beam": 1, "print_alignment": "hard"}, "without --print-alignment"),
]


@pytest.mark.parametrize("options, message", REFUSED, ids=lambda each: str(each)[:20])
def test_what_cannot_draft_is_refused(build, batch, dictionary, options, message):
    with pytest.raises(UsageError, match=message):
        search([shared(build)], dictionary, batch, **{"self_speculative": 2, **options})


PLAIN = [
    ({"no_repeat_ngram_size": 2}, 1, "n-grams are blocked"),
    ({"match_source_len": True}, 1, "the search is a LengthConstrainedBeamSearch"),
    ({}, 2, "several models decode together"),
]


@pytest.mark.parametrize("options, count, why", PLAIN, ids=lambda each: str(each)[:20])
def test_what_is_not_covered_takes_the_plain_path(build, batch, dictionary, options, count, why, caplog):
    say_once.cache_clear()
    models = [shared(build, seed) for seed in range(count)]
    theirs = search(models, dictionary, batch, beam=1, **options)
    with caplog.at_level(logging.INFO):
        assert_same(search(models, dictionary, batch, beam=1, self_speculative=2, **options), theirs)
    assert f"self-speculative decoding: the plain path is taken, since {why}" in caplog.text


def test_the_log_has_the_acceptance_rate(build, batch, dictionary, caplog):
    with caplog.at_level(logging.INFO):
        search([shared(build)], dictionary, batch, beam=1, self_speculative=2)
    assert "2 depths drafted" in caplog.text and "% of which were said" in caplog.text


def test_a_pace_takes_the_cheapest_number_of_drafts():
    now = [0.0]
    pace, taken = Pace(4, clock=lambda: now[0]), []
    assert pace.choices == [0, 1, 2, 4]
    for sentences in (1, 64):
        for _ in range(200):
            draft, began = pace.choose(sentences), pace.begin()
            now[0] += 1 + 0.1 * draft if sentences == 1 else 1 + draft
            pace.end(began, sentences, draft, sentences * (1 + 0.7 * draft))
            taken.append(draft)
    assert taken[:200].count(4) > 150 and taken[200:].count(0) > 150


@needs_native
def test_threads_share_sentences(build, batch, dictionary, monkeypatch):
    monkeypatch.setenv(KERNELS, "native")
    batch = many(batch, 7)
    model = ending(shared(build, dtype=torch.float32), dictionary, batch)
    one = search([model], dictionary, batch, beam=1, self_speculative=2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert_equal(search([model], dictionary, batch, beam=1, self_speculative=2), one)

"""Self-speculative decoding says what greedy search says, whatever the depths that draft would say."""

import logging

import pytest
import torch

from fairseq_adaptive.decoding.speculative_generator import SpeculativeGenerator
from fairseq_adaptive.ops.decoder_step import OP
from searches import MODELS, PRE_LN, assert_same, halting, search, shared

KERNELS = "FAIRSEQ_ADAPTIVE_KERNELS"
BACKENDS = [
    pytest.param(
        "native",
        marks=pytest.mark.skipif(
            OP.obstacle("native", "cpu", torch.float32) is not None,
            reason=f"the library is not there: {OP.obstacle('native', 'cpu', torch.float32)}",
        ),
    ),
    "torch",
]
FIT = [flags for flags in MODELS if not {"adaptive_softmax_cutoff", "decoder_input_dim"} & set(flags)]


def assert_equal(ours, theirs):
    """Bit by bit."""
    assert_same(ours, theirs)
    for our, their in zip(sum(ours, []), sum(theirs, [])):
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


@pytest.mark.parametrize("flags", FIT, ids=lambda flags: "-".join(flags) or "plain")
@pytest.mark.parametrize("exit, draft", [(1, 2), (3, 5)])
def test_equals_greedy_bit_by_bit(build, batch, dictionary, flags, exit, draft, monkeypatch, made):
    monkeypatch.setenv(KERNELS, "native")
    batch = many(batch)
    model = ending(shared(build, dtype=torch.float32, **flags), dictionary, batch)
    theirs = search([model], dictionary, batch, beam=1)
    print("LEN", sorted({len(each["tokens"]) for found in theirs for each in found}))
    assert len({len(each["tokens"]) for found in theirs for each in found}) > 2
    assert_equal(search([model], dictionary, batch, beam=1, self_speculative=exit, draft=draft), theirs)
    assert made[0].tally.rounds and 0 < made[0].tally.acceptance < 1

"""CALM's rules in decoders: the threshold that falls over the sentence, and the head that learns when the word stays."""

import logging
import math

import pytest
import torch
from fairseq.sequence_generator import SequenceGenerator

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules import LayerStack, recording
from fairseq_adaptive.modules.layers.known import say_once
from fairseq_adaptive.modules.policies import ExitHead, Place, Saturation, build_policy
from searches import assert_same, search, shared

OVER = '{"decay_over": 12}'
RULES = ("saturation", "margin", "exit_head")


THRESHOLDS = {"saturation": 0.9, "margin": 0.3, "exit_head": 0.5}


def decoder_of(build, rule, args=OVER, **flags):
    flags = {"decoder_halting": rule, "decoder_halting_args": args, "halting_threshold": THRESHOLDS[rule], **flags}
    model = shared(build, **flags)
    if rule == "exit_head":
        torch.nn.init.normal_(model.decoder.layers.halting.unit.weight, std=0.4)
    for layer in model.decoder.layers.children():
        layer.need_attn = False  # with weights fairseq takes its softmax in float32, in a float64 model, too
    return model


def test_the_threshold_falls():
    """At t tokens after the first 0.9 threshold + 0.1 threshold exp(-4 t / N)."""
    rule, position = Saturation(0.8, decay_over=10), torch.arange(30)
    expected = [0.8 * 0.9 + 0.8 * 0.1 * math.exp(-4 * t / 10) for t in range(30)]
    found = rule.least({"position": position})
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    assert found[0] == pytest.approx(0.8) and Saturation(0.8).least({}) == 0.8


@torch.no_grad()
@pytest.mark.parametrize("rule", RULES)
def test_dense_packed_incremental_alone_and_in_a_batch(build, batch, rule):
    model, tokens = decoder_of(build, rule), torch.randint(4, 40, (3, 11))
    out, depths, found = model.encoder(batch["src_tokens"], batch["src_lengths"]), [], []
    for packed in (False, True):
        for stack in (each for each in model.modules() if isinstance(each, LayerStack)):
            stack.packed = packed
        with recording(model) as traces:
            found.append(model.decoder(tokens, out)[0])
        depths.append(traces["decoder.layers"][0].updates)
    whole = found[0]
    torch.testing.assert_close(found[1], whole, rtol=0, atol=1e-10)
    assert torch.equal(*depths) and depths[0].unique().numel() > 1
    state = {}
    for step in range(tokens.size(1)):
        one = model.decoder(tokens[:, : step + 1], out, incremental_state=state)[0]
        torch.testing.assert_close(one[:, -1], whole[:, step], rtol=0, atol=1e-10)
    for row in range(3):
        part = model.encoder.reorder_encoder_out(out, torch.tensor([row]))
        torch.testing.assert_close(
            model.decoder(tokens[row : row + 1, :7], part)[0][0], whole[row, :7], rtol=0, atol=1e-10
        )
    model.decoder.layers.halting.decay_over = None
    with recording(model) as traces:
        model.decoder(tokens, out)
    assert not torch.equal(traces["decoder.layers"][0].updates, depths[0])  # it matters


@torch.no_grad()
@pytest.mark.parametrize("packed", (False, True))
def test_padding_before_a_sentence_is_no_part_of_it(build, batch, dictionary, packed):
    """As with ``--left-pad-target``."""
    model, tokens = decoder_of(build, "saturation"), torch.randint(4, 40, (3, 7))
    out = model.encoder(batch["src_tokens"], batch["src_lengths"])
    model.decoder.layers.packed = packed
    whole = model.decoder(tokens, out)[0]
    padded = torch.cat((torch.full((3, 3), dictionary.pad()), tokens), 1)
    torch.testing.assert_close(model.decoder(padded, out)[0][:, 3:], whole, rtol=0, atol=1e-10)


# the others without arguments are in test_beam_generator.py
@pytest.mark.parametrize("rule, args", [*((rule, OVER) for rule in RULES), ("exit_head", None)])
def test_a_search_equals_fairseq(build, batch, dictionary, rule, args):
    model, options = decoder_of(build, rule, args), {"max_len_b": 16, "beam": 4}
    theirs = search([model], dictionary, batch, SequenceGenerator, **options)
    for fast in (False, True):
        assert_same(search([model], dictionary, batch, fast=fast, **options), theirs)


@pytest.mark.parametrize(
    "rule, args, said", (("saturation", OVER, "falls over the sentence"), ("exit_head", None, "ExitHead"))
)
def test_native_steps_do_without(build, batch, dictionary, rule, args, said, caplog):
    say_once.cache_clear()
    model = decoder_of(build, rule, args, dtype=torch.float32)
    with caplog.at_level(logging.INFO):
        search([model], dictionary, batch)
    lines = [record.getMessage() for record in caplog.records if "plain path" in record.getMessage()]
    assert any(said in line for line in lines), lines


def test_the_price_is_the_cross_entropy_of_the_head(build, batch):
    """Against a loop; it has a gradient in the head alone, and none in evaluation."""
    model, tokens = decoder_of(build, "exit_head", None).train(), torch.randint(4, 40, (3, 6))
    tokens[1, 4:] = 1
    stack = model.decoder.layers
    states, step = [], stack.halting.step
    stack.halting.step = lambda before, after, *rest: (states.append(after), step(before, after, *rest))[1]
    with recording(model) as traces:
        model(batch["src_tokens"], batch["src_lengths"], tokens)
    price, head = stack.halting.price(traces["decoder.layers"][0]), stack.halting.unit
    words = [model.decoder.word_scores(each).argmax(-1) for each in states]
    terms = []
    for depth in range(len(states) - 1):
        for row in range(3):
            for place in range(int(tokens[row].ne(1).sum())):
                p = head(states[depth][place, row].detach()).sigmoid()
                same = bool(words[depth][place, row] == words[-1][place, row])
                terms.append(-(p if same else 1 - p).log())
    torch.testing.assert_close(price, torch.stack(terms).mean())
    price.backward()
    assert {name for name, each in model.named_parameters() if each.grad is not None and each.grad.any()} == {
        "decoder.layers.halting.unit.weight",
        "decoder.layers.halting.unit.bias",
    }
    with torch.no_grad(), recording(model.eval()) as traces:
        model(batch["src_tokens"], batch["src_lengths"], tokens)
    assert stack.halting.price(traces["decoder.layers"][0]) == 0


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda build: Saturation(0.9, decay_over=0), "a whole number from 1"),
        (lambda build: Saturation(0.9, decay_over=2.5), "a whole number from 1"),
        (lambda build: build_policy("halting", "exit_head", Place(8, 3)), "learns from the word scores"),
        (lambda build: ExitHead(8, lambda x: x, 0.0), "above 0"),
        (lambda build: decoder_of(build, "exit_head", None).decoder.layers.halting.exit_at(0.5), "--exit-quantile"),
        (
            lambda build: shared(build, halting="saturation", halting_args=OVER),
            "follows a sentence that grows word by word",
        ),
    ],
)
def test_what_is_refused(build, make, words):
    with pytest.raises(UsageError, match=words):
        make(build)

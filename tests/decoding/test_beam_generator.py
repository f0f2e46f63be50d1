"""Beam search finds the hypotheses of fairseq's generator, with their scores, whatever the model and the options."""

import argparse
import math

import pytest
import torch
from fairseq.sequence_generator import SequenceGenerator, SequenceGeneratorWithAlignment

from fairseq_adaptive.decoding.beam_generator import BeamGenerator, best_candidates
from fairseq_adaptive.modules import recording
from fairseq_adaptive.decoding.decoder_step import DecoderStep
from fairseq_adaptive.modules.policies import LearnedHalting, MixtureOfDepths, register_policy
from pairwise import pairwise
from searches import MODELS, OPTIONS, PRE_LN, TINY, UNIQUE, Task, assert_same, halting, lively, search, shared


@pytest.mark.parametrize("flags", MODELS, ids=lambda flags: "-".join(flags) or "plain")
@pytest.mark.parametrize("fast", (False, True))
def test_equals_fairseq(build, batch, dictionary, flags, fast):
    models = [shared(build, **flags)]
    theirs = search(models, dictionary, batch, SequenceGenerator)
    assert flags or len({len(each["tokens"]) for found in theirs for each in found}) > 2
    assert_same(search(models, dictionary, batch, fast=fast), theirs)
    assert models[0].decoder.begin_search(3)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options))
@pytest.mark.parametrize("count", (1, 2))
def test_options_and_ensembles(build, batch, dictionary, options, count):
    models = [shared(build, seed) for seed in range(count)]
    theirs = search(models, dictionary, batch, SequenceGenerator, **options)
    assert_same(search(models, dictionary, batch, **options), theirs)


OTHERS = [{"sampling": True, "sampling_topk": 5}, {"diverse_beam_groups": 3}, {"match_source_len": True}]


@pytest.mark.parametrize("options", OTHERS, ids=lambda options: "-".join(options))
def test_other_searches(build, batch, dictionary, options):
    models = [shared(build)]
    theirs = search(models, dictionary, batch, SequenceGenerator, **options)
    assert_same(search(models, dictionary, batch, fast=True, **options), theirs)


def test_prefix(build, batch, dictionary):
    models, prefix = [shared(build)], torch.tensor([[9, 12], [7, 1], [30, 31]])
    theirs = search(models, dictionary, batch, SequenceGenerator, prefix)
    ours = search(models, dictionary, batch, prefix_tokens=prefix, fast=True)
    assert_same(ours, theirs)
    assert ours[0][0]["tokens"][:2].tolist() == [9, 12]


@pytest.mark.parametrize("rule", ("act", "ut_act", "pondernet", "saturation", "margin", "stick_breaking", "patience"))
@pytest.mark.parametrize("rows, flags", [(1, {}), (3, PRE_LN), (64, {})], ids=str)
def test_halting_equals_fairseq(build, batch, dictionary, rule, rows, flags, monkeypatch):
    model = halting(build, rule, **flags)
    batch = {name: value.repeat(22, *[1] * (value.dim() - 1))[-rows:] for name, value in batch.items()}
    batch["src_tokens"][::4, -3] = 11  # not the same sentences again and again
    options = {"max_len_b": 8 if rows > 3 else 24, "beam": 5}
    theirs = search([model], dictionary, batch, SequenceGenerator, **options)
    ran = watched(monkeypatch)
    assert_same(search([model], dictionary, batch, fast=True, **options), theirs)
    assert any(some for _, some in ran)


@pytest.mark.parametrize("rule", ("act", "ut_act", "pondernet", "loop_gate", "stick_breaking"))
@pytest.mark.parametrize("quantile", (0.3, 0.6))
def test_an_exit_quantile_equals_fairseq(build, batch, dictionary, rule, quantile, monkeypatch):
    """And another quantile, set between two searches, is followed."""
    model = halting(build, rule)
    before = search([model], dictionary, batch, fast=True, beam=5)
    for module in model.modules():
        if isinstance(module, LearnedHalting):
            module.exit_at(quantile)
    theirs = search([model], dictionary, batch, SequenceGenerator, beam=5)
    ran = watched(monkeypatch)
    ours = search([model], dictionary, batch, fast=True, beam=5)
    assert_same(ours, theirs)
    assert any(some for _, some in ran)
    assert any(float(one["score"]) != float(other["score"]) for one, other in zip(sum(ours, []), sum(before, [])))


def watched(monkeypatch):
    """At which depths a step was computed, and whether for some hypotheses only."""
    ran, layer = [], DecoderStep.layer
    monkeypatch.setattr(
        DecoderStep,
        "layer",
        lambda self, x, depth, *args: (ran.append((depth, args[-1] is not None)), layer(self, x, depth, *args))[1],
    )
    return ran


@register_policy("test_monotone_capacity")
class MonotoneCapacity(MixtureOfDepths):
    monotone = True


ROUTED = [
    (router, rule, router_kv, halting_kv)
    for router in ("none", "skimming", "mixture_of_depths", "test_monotone_capacity")
    for rule in ("none", "act", "ut_act", "pondernet")
    for router_kv in (("active", "recompute") if router != "none" else (None,))
    for halting_kv in (("active", "recompute") if rule != "none" else (None,))
    if router != "none" or (rule != "none" and halting_kv == "active")
]


@pytest.mark.parametrize(
    "router, rule, router_kv, halting_kv, rows", pairwise([(*case, rows) for case in ROUTED for rows in (1, 16)])
)
def test_a_routed_step_equals_fairseq(build, batch, dictionary, router, rule, router_kv, halting_kv, rows, monkeypatch):
    flags = PRE_LN if rows > 1 else {}
    given = {
        "decoder_router": router,
        "decoder_halting": rule,
        "decoder_router_kv": router_kv,
        "decoder_halting_kv": halting_kv,
        "halting_threshold": 0.5 if rule == "pondernet" else 0.9,
    }
    model = shared(build, **{name: each for name, each in given.items() if each is not None}, **flags)
    for module in model.modules():
        if isinstance(module, LearnedHalting):
            torch.nn.init.normal_(module.unit.weight, std=0.4)
            torch.nn.init.constant_(module.unit.bias, -1.0)
    for each in model.decoder.layers.router or ():
        if router == "skimming":
            torch.nn.init.normal_(each[1].weight), torch.nn.init.normal_(each[4].weight)
            each[4].bias.data.copy_(torch.tensor([-0.7, 0.7]))
        else:
            torch.nn.init.normal_(each.weight, std=0.4), torch.nn.init.constant_(each.bias, 0.1)
    batch = {name: value.repeat(6, *[1] * (value.dim() - 1))[-rows:] for name, value in batch.items()}
    batch["src_tokens"][::4, -3] = 11
    options = {"max_len_b": 10, "beam": 4}
    theirs = search([model], dictionary, batch, SequenceGenerator, **options)
    ran = watched(monkeypatch)
    assert_same(search([model], dictionary, batch, fast=True, **options), theirs)
    assert any(some for _, some in ran)


def test_halting_that_is_recorded(build, batch, dictionary):
    """Whoever wants the traces gets fairseq's search, which makes them."""
    model = halting(build, "act")
    with recording(model) as traces:
        search([model], dictionary, batch)
    assert len(traces["decoder.layers"]) > 1 and model.decoder.begin_search(3)


NOT_PLAIN = [{"scale_attn": True}, {"no_cross_attention": True, "cross_self_attention": True}]


@pytest.mark.parametrize("flags", NOT_PLAIN, ids=str)
def test_layers_that_are_not_plain(build, batch, dictionary, flags):
    models = [shared(build, **flags)]
    assert models[0].decoder.begin_search(3) is None
    theirs = search(models, dictionary, batch, SequenceGenerator)
    assert_same(search(models, dictionary, batch, fast=True), theirs)


@pytest.mark.parametrize("rule", ("none", "act", "margin"))
def test_alignment(build, batch, dictionary, rule):
    models = [shared(build) if rule == "none" else halting(build, rule)]
    models[0].make_generation_fast_(need_attn=False)  # as whoever loads the model, and prints alignments later
    theirs = search(models, dictionary, batch, SequenceGeneratorWithAlignment, print_alignment="hard")
    ours = search(models, dictionary, batch, print_alignment="hard", fast=True)
    assert_same(ours, theirs)
    for our, their in zip(ours[0], theirs[0]):
        assert our["alignment"] == their["alignment"] and our["alignment"]


def test_not_a_number_is_never_chosen(build, batch, dictionary):
    """A hypothesis whose model breaks down gives way to the others, as in fairseq."""
    models = [shared(build)]
    common = search(models, dictionary, batch, SequenceGenerator)[0][0]["tokens"][0]
    models[0].decoder.embed_tokens.weight.data[common] = math.nan
    theirs = search(models, dictionary, batch, SequenceGenerator)
    assert all(each["tokens"].numel() and each["score"].isfinite() for found in theirs for each in found)
    assert_same(search(models, dictionary, batch), theirs)


def test_half_precision(build, batch, dictionary):
    models = [shared(build)]
    theirs = search(models, dictionary, batch)
    for dtype in (torch.bfloat16, torch.float16):
        ours = search([models[0].to(dtype)], dictionary, batch)
        assert abs(ours[0][0]["score"] - theirs[0][0]["score"]) < 0.1


def test_language_model(build, batch, dictionary):
    flags = {name: value for name, value in {**TINY, **UNIQUE}.items() if name.startswith("decoder")}
    model = lively(build("shared_transformer_lm_base", decoder_input_dim=16, decoder_output_dim=16, **flags))
    theirs = search([model], dictionary, batch, SequenceGenerator)
    assert_same(search([model], dictionary, batch), theirs)


def test_dropout_at_inference(build, batch, dictionary):
    model = shared(build, dropout=0.3)
    model.make_generation_fast_(retain_dropout=True, retain_dropout_modules=None)
    assert model.decoder.begin_search(3) is None


def test_autocast(build, batch, dictionary):
    models = [shared(build, dtype=torch.float32)]
    theirs = search(models, dictionary, batch)
    with torch.autocast("cpu", torch.bfloat16):
        ours = search(models, dictionary, batch, fast=True)
    assert abs(ours[0][0]["score"] - theirs[0][0]["score"]) < 0.1


@pytest.mark.parametrize(
    "order", ([1, 0, 2, 2, 5, 4], [3, 3, 4, 5], [4, 5, 0, 1]), ids=("swapped", "fewer", "backwards")
)
@pytest.mark.parametrize("padded", (False, True))
def test_a_step_equals_the_full_decoder_after_reordering(build, batch, order, padded):
    """Every depth sees the tokens from which a hypothesis descends; also past the first block of the cache."""
    # fairseq counts positions without padding in the full decoder, and with it in steps
    model, order = shared(build, no_token_positional_embeddings=padded), torch.tensor(order)
    torch.manual_seed(2)
    previous = torch.randint(4, 44, (6, 45))
    previous[1:4, 7] = 1 if padded else 9
    previous[1::2, 0] = previous[::2, 0]
    state = model.decoder.begin_search(2)
    with torch.no_grad():
        encoder_out, steps = model.encoder(batch["src_tokens"], batch["src_lengths"]), []
        for step in range(45):
            rows = previous[::2] if step == 0 else previous
            out, _ = model.decoder(rows[:, : step + 1], encoder_out=encoder_out, incremental_state=state)
            steps.append(out[:, 0])
            if step in (0, 20):
                now = torch.arange(3).repeat_interleave(2) if step == 0 else order
                model.decoder.reorder_incremental_state_scripting(state, now)
                previous = previous[order] if step else previous
        sentences = order // 2
        full, _ = model(batch["src_tokens"][sentences], batch["src_lengths"][sentences], previous)
    torch.testing.assert_close(torch.stack(steps[21:], 1), full[:, 21:], rtol=0, atol=1e-6)


@pytest.mark.parametrize("words", (128, 4000, 4096))
@pytest.mark.parametrize("rows", (1, 5))
def test_best_candidates(words, rows):
    torch.manual_seed(4)
    lprobs, scores = torch.randn(2**18 // words + 1, rows, words), torch.randn(2**18 // words + 1, rows)
    lprobs[0, :, 7:], lprobs[1, :, 3] = -math.inf, math.inf
    best, word, row = best_candidates(lprobs, scores, 10)
    total = lprobs + scores.unsqueeze(2)
    assert torch.equal(best, total.flatten(1).topk(10).values)
    assert torch.equal(best, total[torch.arange(len(best)).unsqueeze(1), row, word])
    finite = torch.where(best.isfinite(), row * words + word, torch.arange(10) - 10)
    assert all(len(set(each)) == 10 for each in finite.tolist())


def test_only_models_that_ask_get_it(build, dictionary):
    task, args = Task(dictionary), argparse.Namespace(beam=2)
    ours, stock = shared(build), build("transformer", **TINY)
    assert type(task.build_generator([ours], args)) is BeamGenerator
    assert type(task.build_generator([stock], args)) is SequenceGenerator
    assert type(task.build_generator([ours, stock], args)) is SequenceGenerator

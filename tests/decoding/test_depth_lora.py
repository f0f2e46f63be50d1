"""Searches of a model that differs from depth to depth say what fairseq's own search says, with all fast paths taken."""

import logging

import pytest
import torch
from fairseq.sequence_generator import SequenceGenerator

from fairseq_adaptive.decoding.native_steps import NativeSteps
from fairseq_adaptive.decoding.torch_rounds import TorchRounds
from fairseq_adaptive.modules.layers.depth_lora import PARTS
from fairseq_adaptive.modules.layers.known import say_once
from fairseq_adaptive.modules.layers.prepacked_linear import constant_weights
from fairseq_adaptive.ops.decoder_step import OP, native
from searches import TINY, assert_same, halting, lively, moved, search, shared

KERNELS = "FAIRSEQ_ADAPTIVE_KERNELS"
PRE_LN = {"encoder_normalize_before": True, "decoder_normalize_before": True}
RULES = (None, "act", "ut_act", "pondernet", "saturation", "margin")
# 5 depths: of 2 layers the one that serves a single depth, if any, has no differences
SCHEDULES = {
    "cycle": {"layer_sharing": "cycle"},
    "sequence": {"layer_sharing": "sequence"},
    "cycle_rev": {"layer_sharing": "cycle_rev"},
    "one": {"encoder_unique_layers": 1, "decoder_unique_layers": 1},
    "lone": {"layer_sharing": "middle_cycle", "encoder_unique_layers": 3, "decoder_unique_layers": 3},
}
CASES = [
    *((None, schedule) for schedule in SCHEDULES),
    *((rule, where) for rule in RULES[1:] for where in ("cycle", "lone")),
]
needs_native = pytest.mark.skipif(
    OP.obstacle("native", "cpu", torch.float32) is not None,
    reason=f"the library is not there: {OP.obstacle('native', 'cpu', torch.float32)}",
)
BACKENDS = [pytest.param("native", marks=needs_native), "torch"]


@pytest.fixture
def said(caplog):
    """``said()``: why some fast path was not taken."""
    say_once.cache_clear()
    caplog.set_level(logging.INFO)
    return lambda: [line for line in map(logging.LogRecord.getMessage, caplog.records) if "plain path" in line]


def different(build, rule=None, **flags):
    flags = {"dtype": torch.float32, "depth_lora_rank": 3, **flags}
    return moved(halting(build, rule, **flags) if rule else shared(build, **flags))


@needs_native
@pytest.mark.parametrize("norm", ({}, PRE_LN), ids=("post", "pre"))
@pytest.mark.parametrize("rule, schedule", CASES)
def test_equals_the_search_of_fairseq(build, batch, dictionary, rule, schedule, norm, monkeypatch, said):
    model = different(build, rule, **SCHEDULES[schedule], **norm)
    theirs = search([model], dictionary, batch, SequenceGenerator)
    for backend in ("torch", "native"):
        monkeypatch.setenv(KERNELS, backend)
        assert_same(search([model], dictionary, batch), theirs)
    assert len(said()) == 1  # of the encoder, whose native layers have no place for what differs
    for name, each in model.named_parameters():
        if name.rpartition(".")[2] in PARTS:
            torch.nn.init.zeros_(each)
    without = search([model], dictionary, batch)
    assert any(a["score"] != b["score"] for a, b in zip(sum(without, []), sum(theirs, [])))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", ({}, {"decoder_normalize_before": True}), ids=("post", "pre"))
@pytest.mark.parametrize("draft", ({}, {"beam": 1, "self_speculative": 2, "draft": 3}), ids=("beam", "drafts"))
def test_language_model(build, batch, dictionary, draft, norm, backend, monkeypatch, said):
    flags = {name: value for name, value in TINY.items() if name.startswith("decoder")}
    sizes = {"decoder_input_dim": 16, "decoder_output_dim": 16, "decoder_unique_layers": 2, **norm}
    model = build("shared_transformer_lm", dtype=torch.float32, depth_lora_rank=3, **flags, **sizes)
    model = lively(moved(model))
    theirs = search([model], dictionary, batch, SequenceGenerator, beam=draft.get("beam", 3))
    monkeypatch.setenv(KERNELS, backend)
    assert_same(search([model], dictionary, batch, **draft), theirs)
    assert not said()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", (None, "act", "margin"))
@pytest.mark.parametrize("schedule", ("cycle", "lone"))
def test_drafts(build, batch, dictionary, schedule, rule, backend, monkeypatch):
    model = different(build, rule, **SCHEDULES[schedule], decoder_normalize_before=True)
    theirs = search([model], dictionary, batch, SequenceGenerator, beam=1)
    rounds, start = [], TorchRounds.__init__
    monkeypatch.setattr(TorchRounds, "__init__", lambda self, *args: (start(self, *args), rounds.append(self))[0])
    monkeypatch.setenv(KERNELS, backend)
    assert_same(search([model], dictionary, batch, beam=1, self_speculative=2, draft=3), theirs)
    assert bool(rounds) == (backend == "torch" and rule is None)


def test_routed_tokens(build, batch, dictionary, said):
    """Keys and values of tokens that are left out are those of the depth."""
    flags = {"decoder_router": "mixture_of_depths", "decoder_router_kv": "recompute", "dtype": torch.float64}
    model = different(build, **flags)
    theirs = search([model], dictionary, batch, SequenceGenerator)
    assert_same(search([model], dictionary, batch), theirs)
    assert not any("beam search: the plain path" in line and "native" not in line for line in said())


@needs_native
def test_a_layer_is_laid_out_for_each_of_its_depths_once_while_constant(build, batch, dictionary, monkeypatch):
    packed, start = [], native.Packed.__init__
    monkeypatch.setattr(native.Packed, "__init__", lambda self, given: (start(self, given), packed.append(given))[0])
    model = different(build, **SCHEDULES["lone"])
    with constant_weights():
        for _ in range(3):
            before = search([model], dictionary, batch)
        assert len(packed) == 2  # encoder and decoder
    encoder, decoder = packed[0], packed[1].stack
    assert len(encoder.layers) == len(decoder.layers) == 5 and list(decoder.schedule) == [0, 1, 2, 3, 4]
    shared_out = sum(layer.lora_rank == 0 for layer in map(model.decoder.layers.layer, range(3)))
    assert shared_out == 2  # those of one depth
    model.decoder.layers.layer(1).fc1.depth_b.data.mul_(1.5)
    after = search([model], dictionary, batch)
    assert_same(after, search([model], dictionary, batch, SequenceGenerator))
    assert after[0][0]["score"] != before[0][0]["score"] and len(packed) == 4


@needs_native
def test_a_layer_without_differences_is_laid_out_once(build, batch, dictionary, monkeypatch):
    made, start = [], NativeSteps.__init__
    monkeypatch.setattr(NativeSteps, "__init__", lambda self, *args: (start(self, *args), made.append(self))[0])
    search([different(build, depth_lora_rank=0)], dictionary, batch)
    stack = made[0]._search._decoder.given.stack
    assert len(stack.layers) == 2 and len(stack.schedule) == 5

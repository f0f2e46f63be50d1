"""Native steps find the hypotheses of the search that calls modules, and give way where anything is not known."""

import logging
import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from searches import MODELS, OPTIONS, PRE_LN, TINY, UNIQUE, assert_same, halting, lively, search, shared
from fairseq_adaptive.decoding.beam_generator import BeamGenerator
from fairseq_adaptive.decoding.native_steps import NativeSteps
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules.layers.known import say_once
from fairseq_adaptive.modules.layers.prepacked_linear import constant_weights
from fairseq_adaptive.modules.policies import LearnedHalting
from fairseq_adaptive.ops.decoder_step import OP, native
from threads import assert_threads_equal_one

pytestmark = pytest.mark.skipif(
    OP.obstacle("native", "cpu", torch.float32) is not None,
    reason=f"the library is not there: {OP.obstacle('native', 'cpu', torch.float32)}",
)
KERNELS = "FAIRSEQ_ADAPTIVE_KERNELS"


@pytest.fixture
def both(dictionary, monkeypatch):
    """``both(models, batch, **options)``: hypotheses of native steps, asked for by name, and of torch's."""

    def both(models, batch, **options):
        found = []
        for kernels in ("native", "torch"):
            monkeypatch.setenv(KERNELS, kernels)
            found.append(search(models, dictionary, batch, **options))
        return found

    return both


@pytest.fixture
def made(monkeypatch):
    """The native steps that searches make."""
    made, start = [], NativeSteps.__init__
    monkeypatch.setattr(NativeSteps, "__init__", lambda self, *args: (start(self, *args), made.append(self))[0])
    return made


def single(build, **flags):
    return shared(build, dtype=torch.float32, **flags)


FIT = [flags for flags in MODELS if not {"adaptive_softmax_cutoff", "decoder_input_dim"} & set(flags)]


@pytest.mark.parametrize("flags", FIT, ids=lambda flags: "-".join(flags) or "plain")
@pytest.mark.parametrize("fast", (False, True))
def test_equals_torch(build, batch, both, flags, fast):
    assert_same(*both([single(build, **flags)], batch, fast=fast))


@pytest.mark.parametrize("options", OPTIONS[:-1], ids=lambda options: "-".join(options))
def test_options(build, batch, both, options):
    assert_same(*both([single(build)], batch, **options))


def test_suppressed_words(build, batch, dictionary, monkeypatch):
    model = single(build)
    common = search([model], dictionary, batch)[0][0]["tokens"][0]
    options = {"beam_size": 3, "max_len_b": 24, "tokens_to_suppress": [dictionary[common], dictionary[9]]}
    sample = {"net_input": {name: value for name, value in batch.items() if name != "prev_output_tokens"}}
    found = []
    for kernels in ("native", "torch"):
        monkeypatch.setenv(KERNELS, kernels)
        found.append(BeamGenerator([model], dictionary, **options).generate([], sample))
    assert_same(*found)
    assert not any({int(common), 9} & set(each["tokens"].tolist()) for each in sum(found[0], []))


@pytest.mark.parametrize("rule", ("act", "ut_act", "pondernet", "saturation", "margin"))
@pytest.mark.parametrize("rows, flags", [(1, {}), (3, PRE_LN), (64, {})], ids=str)
def test_halting(build, batch, both, rule, rows, flags):
    model = halting(build, rule, dtype=torch.float32, **flags)
    batch = {name: value.repeat(22, *[1] * (value.dim() - 1))[-rows:] for name, value in batch.items()}
    batch["src_tokens"][::4, -3] = 11
    assert_same(*both([model], batch, fast=True, max_len_b=8 if rows > 3 else 24, beam=5))


@pytest.mark.parametrize("rule", ("act", "ut_act", "pondernet"))
@pytest.mark.parametrize("quantile", (0.3, 0.6))
def test_exit_quantile(build, batch, both, made, rule, quantile):
    """What is prepared for one quantile does not serve another."""
    model, found = halting(build, rule, dtype=torch.float32), []
    for each in (None, quantile):
        for module in model.modules() if each else ():
            if isinstance(module, LearnedHalting):
                module.exit_at(each)
        found.append(both([model], batch, fast=True, max_len_b=12, beam=5))
        assert_same(*found[-1])
    assert len(made) == 2
    one, other = (sum(each[0], []) for each in found)
    assert any(float(a["score"]) != float(b["score"]) for a, b in zip(one, other))


@pytest.mark.parametrize("rule, name", (("loop_gate", "LoopGate"), ("stick_breaking", "StickBreaking")))
def test_rules_that_native_steps_do_not_know(build, batch, dictionary, made, rule, name, caplog):
    say_once.cache_clear()
    model = halting(build, rule, dtype=torch.float32)
    for module in model.modules():
        if isinstance(module, LearnedHalting):
            module.exit_at(0.4)
    with caplog.at_level(logging.INFO):
        search([model], dictionary, batch)
    said = [record.getMessage() for record in caplog.records if "plain path" in record.getMessage()]
    assert not made and any(f"tokens halt by {name}" in line for line in said)


def test_language_model(build, batch, both):
    flags = {name: value for name, value in {**TINY, **UNIQUE}.items() if name.startswith("decoder")}
    model = build(
        "shared_transformer_lm_base", dtype=torch.float32, decoder_input_dim=16, decoder_output_dim=16, **flags
    )
    assert_same(*both([lively(model)], batch))


def test_an_encoder_that_is_not_plain(build, batch, both, made):
    """The decoder's steps are native all the same."""
    model = single(build)
    model.encoder.layers.layer(0).register_forward_hook(lambda module, args, out: out * 1.5)
    ours, theirs = both([model], batch)
    assert_same(ours, theirs)
    assert len(made) == 1
    plain = both([single(build)], batch)[0]
    assert ours[0][0]["score"] != plain[0][0]["score"]


def test_not_a_number_is_never_chosen(build, batch, dictionary, both):
    model = single(build)
    common = search([model], dictionary, batch)[0][0]["tokens"][0]
    model.decoder.embed_tokens.weight.data[common] = math.nan
    ours, theirs = both([model], batch)
    assert_same(ours, theirs)
    assert all(each["tokens"].numel() and each["score"].isfinite() for found in ours for each in found)


def hook(model):
    model.decoder.layers.layer(1).fc1.register_forward_hook(lambda module, args, out: out * 2)


def hook_on_the_embedding(model):
    model.decoder.embed_tokens.register_forward_hook(lambda module, args, out: out * 2)


def hook_on_the_words(model):
    model.decoder.output_projection.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def subclass(model):
    kind = type(model.decoder.layer_norm or model.decoder.layers.layer(0).final_layer_norm)
    changed = type("Doubled", (kind,), {"forward": lambda self, x: kind.forward(self, x) * 2})
    model.decoder.layers.layer(0).final_layer_norm.__class__ = changed


def another_map(model):
    class Other(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.linear, self.weight, self.bias = linear, linear.weight, linear.bias
            self.in_features, self.out_features = linear.in_features, linear.out_features

        def forward(self, x):
            return self.linear(x).tanh()

    model.decoder.layers.layer(0).fc2 = Other(model.decoder.layers.layer(0).fc2)


def parametrized(model):
    class Double(nn.Module):
        def forward(self, weight):
            return weight * 2

    nn.utils.parametrize.register_parametrization(model.decoder.output_projection, "weight", Double())


def another_method(model):
    stock = model.decoder.output_layer
    model.decoder.output_layer = lambda features, **kwargs: stock(features) * 2


def other_probabilities(model):
    stock = model.get_normalized_probs
    model.get_normalized_probs = lambda *args, **kwargs: stock(*args, **kwargs) * 2


def another_rule(model):
    unit = model.decoder.layers.halting.unit
    unit.register_forward_hook(lambda module, args, out: out + 3)


CHANGES = (
    hook,
    hook_on_the_embedding,
    hook_on_the_words,
    subclass,
    another_map,
    parametrized,
    another_method,
    other_probabilities,
    another_rule,
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_module_is_called(build, batch, dictionary, change, monkeypatch, made):
    model = halting(build, "act", dtype=torch.float32)
    before = search([model], dictionary, batch)
    assert len(made) == 1
    change(model)
    monkeypatch.setenv(KERNELS, "torch")
    theirs = search([model], dictionary, batch)
    monkeypatch.setenv(KERNELS, "auto")
    assert_same(search([model], dictionary, batch), theirs)
    assert len(made) == 1 and theirs[0][0]["score"] != before[0][0]["score"]
    monkeypatch.setenv(KERNELS, "native")
    with pytest.raises(UsageError, match="KERNELS=native, but decoder_step cannot use it in this search: "):
        search([model], dictionary, batch)


UNFIT = [
    ({"adaptive_softmax_cutoff": "20,30"}, {}, "the softmax is adaptive"),
    ({"decoder_input_dim": 12, "decoder_output_dim": 12}, {}, "embeddings are projected"),
    ({"activation_fn": "tanh"}, {}, "the activation is tanh"),
    ({"decoder_halting": "act", "decoder_halting_kv": "active"}, {}, "tokens halt by ACT and are seen"),
    ({"decoder_router": "skimming"}, {}, "a router chooses tokens"),
    ({"scale_attn": True}, {}, "its decoder is not plain"),
    ({}, {"no_repeat_ngram_size": 2}, "n-grams are blocked"),
    ({}, {"sampling": True}, "it is no plain beam search"),
    ({}, {"prefix_tokens": torch.tensor([[9], [7], [30]])}, "it is no plain beam search"),
]


@pytest.mark.parametrize("flags, options, why", UNFIT, ids=lambda each: str(each)[:30])
def test_what_does_not_fit(build, batch, dictionary, flags, options, why, monkeypatch, made):
    model = single(build, **flags)
    search([model], dictionary, batch, **options)
    assert not made
    monkeypatch.setenv(KERNELS, "native")
    with pytest.raises(UsageError, match=why):
        search([model], dictionary, batch, **options)


def test_a_source_without_words(build, batch, dictionary, monkeypatch, made):
    model, batch = single(build), {name: each.clone() for name, each in batch.items()}
    batch["src_tokens"][1] = dictionary.pad()
    monkeypatch.setenv(KERNELS, "native")
    with pytest.raises(UsageError, match="a source has no words"):
        search([model], dictionary, batch)
    assert not made


def test_adaptive_input(build, batch, dictionary, monkeypatch, made):
    flags = {name: value for name, value in {**TINY, **UNIQUE}.items() if name.startswith("decoder")}
    adaptive = {"adaptive_input": True, "adaptive_input_cutoff": "10,20", "adaptive_softmax_cutoff": "10,20"}
    sizes = {"decoder_input_dim": 16, "decoder_output_dim": 16}
    model = build("shared_transformer_lm_base", dtype=torch.float32, **sizes, **adaptive, **flags)
    search([model], dictionary, batch)
    assert not made
    monkeypatch.setenv(KERNELS, "native")
    with pytest.raises(UsageError, match="the embedding is AdaptiveInput"):
        search([model], dictionary, batch)


def test_what_is_around_does_not_fit(build, batch, dictionary, made):
    model = single(build)
    for context in (FlopCounterMode(display=False), torch.autocast("cpu", torch.bfloat16), torch.device("cpu")):
        with context:
            search([model], dictionary, batch, max_len_b=3)
    search([model, single(build, seed=2)], dictionary, batch)
    search([model.double()], dictionary, batch)
    assert not made


def test_the_log_says_why_once(build, batch, dictionary, caplog):
    say_once.cache_clear()
    model = single(build)
    hook(model)
    with caplog.at_level(logging.INFO):
        search([model], dictionary, batch), search([model], dictionary, batch)
        search([single(build, activation_fn="tanh")], dictionary, batch)
    lines = [record.getMessage() for record in caplog.records if "plain path" in record.getMessage()]
    assert [line for line in lines if "native" in line] == [
        "native steps of beam search: the plain path is taken, since the activation is tanh"
    ]
    assert any("has hooks" in line for line in lines)


@pytest.mark.parametrize("constant", (False, True))
def test_weights_that_change_are_seen(build, batch, dictionary, both, constant):
    """Between two searches in place; while they are constant, by others in their place."""
    model = single(build)
    both([model], batch)
    if not constant:
        model.decoder.layers.layer(0).fc1.weight.data.mul_(1.5)
        model.encoder.layers.layer(0).fc1.weight.data.mul_(1.5)
        assert_same(*both([model], batch))
        return
    with constant_weights():
        before = both([model], batch)[0]
        for side in (model.encoder, model.decoder):
            side.layers.layer(0).fc1.weight = nn.Parameter(side.layers.layer(0).fc1.weight * 1.5)
        ours, theirs = both([model], batch)
    assert_same(ours, theirs)
    assert ours[0][0]["score"] != before[0][0]["score"]


def test_weights_are_laid_out_once_while_constant(build, batch, dictionary, monkeypatch):
    packed, start = [], native.Packed.__init__
    monkeypatch.setattr(native.Packed, "__init__", lambda self, given: (start(self, given), packed.append(self))[0])
    model = single(build)
    with constant_weights():
        for _ in range(3):
            search([model], dictionary, batch)
    assert len(packed) == 2  # encoder and decoder
    search([model], dictionary, batch)
    assert len(packed) == 4


@pytest.mark.parametrize("rule", ("none", "act"))
def test_hypotheses_do_not_depend_on_the_batch(build, batch, dictionary, rule, made):
    """Bit by bit: also among padding, and other sentences that end earlier."""
    model = single(build, **({} if rule == "none" else {"decoder_halting": rule}))
    if rule != "none":
        nn.init.normal_(model.decoder.layers.halting.unit.weight, std=0.4)
    many = {name: value.repeat(4, *[1] * (value.dim() - 1)) for name, value in batch.items()}
    many["src_tokens"][5::3, -4:-1] = torch.tensor([[9, 30, 12]])
    together = search([model], dictionary, many)
    for number, found in enumerate(together):
        length = int(many["src_lengths"][number])
        alone = {name: value[number : number + 1] for name, value in many.items()}
        alone["src_tokens"] = alone["src_tokens"][:, -length:]
        for one, other in zip(search([model], dictionary, alone)[0], found):
            assert torch.equal(one["tokens"], other["tokens"]) and torch.equal(one["score"], other["score"])
    assert len(made) == 13


def test_threads_of_a_search(build, batch, dictionary):
    model, before = single(build), torch.get_num_threads()
    one = search([model], dictionary, batch)
    try:
        torch.set_num_threads(2)
        two = search([model], dictionary, batch)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a["score"], b["score"]) for a, b in zip(sum(one, []), sum(two, [])))


def test_several_searches_at_a_time(build, batch, dictionary):
    model = single(build).requires_grad_(False)
    batches = [{name: each[row : row + 1] for name, each in batch.items()} for row in range(3)]
    assert_threads_equal_one(
        lambda each: search([model], dictionary, each, max_len_b=6)[0][0]["positional_scores"],
        batches,
        torch.equal,
        times=3,
    )


def test_a_first_word_that_does_not_exist(build, batch, dictionary):
    generator = BeamGenerator([single(build)], dictionary, beam_size=2, max_len_b=4)
    sample = {"net_input": {name: value for name, value in batch.items() if name != "prev_output_tokens"}}
    with pytest.raises(IndexError, match="none of 48 words"):
        generator.generate([], sample, bos_token=48)


def test_another_threshold_is_seen(build, batch, dictionary, both):
    """Also while weights are constant."""
    model = single(build, decoder_halting="saturation", halting_threshold=0.99)
    with constant_weights():
        before = both([model], batch)[0]
        model.decoder.layers.halting.threshold = 0.5
        ours, theirs = both([model], batch)
    assert_same(ours, theirs)
    assert ours[0][0]["score"] != before[0][0]["score"]

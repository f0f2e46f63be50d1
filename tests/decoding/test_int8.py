"""Translation and language models in int8: the definition's words, natively and with torch's steps, with drafts and without."""

import logging

import pytest
import torch

from decoding.test_self_speculative import ending, made, many  # noqa: F401  a fixture
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules.layers.int8_linear import Int8Linear
from fairseq_adaptive.modules.layers.known import say_once
from fairseq_adaptive.modules.layers.prepacked_linear import constant_weights
from fairseq_adaptive.ops.decoder_step import OP
from models.test_changed_modules import LoRA
from models.test_int8 import Emulated
from searches import MODELS, halting, moved, search, shared

KERNELS = "FAIRSEQ_ADAPTIVE_KERNELS"
needs_native = pytest.mark.skipif(
    OP.obstacle("native", "cpu", torch.float32) is not None,
    reason=f"the library is not there: {OP.obstacle('native', 'cpu', torch.float32)}",
)
BACKENDS = [pytest.param("native", marks=needs_native), "torch"]
# whole vectors, of 16 numbers at most
WIDE = {f"{side}_{name}": 32 for side in ("encoder", "decoder") for name in ("embed_dim", "ffn_embed_dim")}
WIDE |= {"decoder_input_dim": 32, "decoder_output_dim": 32}
RULES = ("act", "ut_act", "pondernet", "saturation", "margin")
FIT = [flags for flags in MODELS if "decoder_input_dim" not in flags]


def small(build, dictionary, batch, rule=None, **flags):
    """A model in int8, and another of the same weights in float32."""
    found = []
    for _ in range(2):
        given = {**WIDE, **flags, "dtype": torch.float32}
        model = shared(build, **given) if rule is None else halting(build, rule, **given)
        found.append(model if "adaptive_softmax_cutoff" in flags else ending(model, dictionary, batch))
    return found[0].int8(), found[1]


def emulated(model):
    """The definition in the place of each map."""
    for parent in list(model.modules()):
        for name, each in list(parent.named_children()):
            if type(each) is Int8Linear:
                setattr(parent, name, Emulated(each))
    return model


def words(found):
    return [each[0]["tokens"].tolist() for each in found]


def mean_score(found):
    return torch.stack([each["score"] for hypotheses in found for each in hypotheses[:1]])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("flags", FIT, ids=lambda flags: "-".join(flags) or "plain")
def test_says_what_the_definition_says(build, batch, dictionary, flags, backend, monkeypatch):
    """A number that lies between two steps may fall to the other one: here and there another word."""
    batch = many(batch)
    model, plain = small(build, dictionary, batch, **flags)
    definition = emulated(small(build, dictionary, batch, **flags)[0])
    monkeypatch.setenv(KERNELS, "torch")
    expected, theirs = (search([each], dictionary, batch) for each in (definition, plain))
    monkeypatch.setenv(KERNELS, "torch" if "adaptive_softmax_cutoff" in flags else backend)
    ours = search([model], dictionary, batch)
    same = [one == other for one, other in zip(words(ours), words(expected))]
    assert sum(same) >= 0.8 * len(same)
    near = (mean_score(ours) - mean_score(expected)).abs()
    assert near.median() < 1e-3 < (mean_score(theirs) - mean_score(expected)).abs().max()


@needs_native
@pytest.mark.parametrize("rule", (None, *RULES))
@pytest.mark.parametrize("exit, draft", [(1, 2), (3, 5)])
def test_drafts_change_nothing_bit_by_bit(build, batch, dictionary, rule, exit, draft, monkeypatch, made):  # noqa: F811
    monkeypatch.setenv(KERNELS, "native")
    batch = many(batch)
    model, _ = small(build, dictionary, batch, rule, encoder_normalize_before=True, decoder_normalize_before=True)
    theirs = search([model], dictionary, batch, beam=1)
    ours = search([model], dictionary, batch, beam=1, self_speculative=exit, draft=draft)
    assert words(ours) == words(theirs) and made[0].tally.rounds
    assert all(
        torch.equal(one[0]["positional_scores"], other[0]["positional_scores"]) for one, other in zip(ours, theirs)
    )


def test_drafts_in_torch(build, batch, dictionary, monkeypatch, made):  # noqa: F811
    monkeypatch.setenv(KERNELS, "torch")
    batch = many(batch, 9)
    model, _ = small(build, dictionary, batch)
    theirs = search([model], dictionary, batch, beam=1)
    assert words(search([model], dictionary, batch, beam=1, self_speculative=2, draft=3)) == words(theirs)
    assert made[0].tally.rounds


def test_a_model_that_is_turned_to_int8_while_weights_are_constant(build, batch, dictionary):
    """What was laid out before is not what runs."""
    model = shared(build, dtype=torch.float32, **WIDE)
    with constant_weights():
        search([model], dictionary, batch)
        found = mean_score(search([model.int8()], dictionary, batch))
    assert torch.equal(found, mean_score(search([model], dictionary, batch)))
    other = shared(build, dtype=torch.float32, **WIDE)
    assert not torch.equal(found, mean_score(search([other], dictionary, batch)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", (None, "act", "margin"))
def test_a_sentence_is_the_same_alone(build, batch, dictionary, rule, backend, monkeypatch):
    monkeypatch.setenv(KERNELS, backend)
    batch = many(batch, 6)
    model, _ = small(build, dictionary, batch, rule)
    together = search([model], dictionary, batch)
    for row in range(6):
        (alone,) = search([model], dictionary, {name: value[row : row + 1] for name, value in batch.items()})
        assert alone[0]["tokens"].tolist() == together[row][0]["tokens"].tolist()
        if backend == "native" and rule != "act":  # an encoder that halts runs by torch
            assert torch.equal(alone[0]["positional_scores"], together[row][0]["positional_scores"])


@pytest.mark.parametrize(
    "flags, why",
    [
        ({"decoder_ffn_embed_dim": 36}, "36 is no multiple of "),
        ({"lora": True}, "LoRA is none of the known classes"),
        ({"hook": True}, "Linear has hooks"),
    ],
    ids=("odd sizes", "LoRA", "hook"),
)
def test_what_does_not_fit_is_said_and_searched_otherwise(build, batch, dictionary, flags, why, monkeypatch, caplog):
    say_once.cache_clear()
    monkeypatch.delenv(KERNELS, raising=False)
    changed = {name for name in ("lora", "hook") if name in flags}
    model = shared(build, dtype=torch.float32, **{**WIDE, **{name: flags[name] for name in set(flags) - changed}})
    layer = model.decoder.layers[0]
    if "lora" in flags:
        layer.fc1 = LoRA(layer.fc1)
    if "hook" in flags:
        layer.fc1.register_forward_hook(lambda module, args, out: out + 1)
    model.int8()
    with caplog.at_level(logging.INFO):
        found = search([model], dictionary, batch)
    assert len(found) == len(batch["src_tokens"])
    if OP.obstacle("native", "cpu", torch.float32) is None:
        assert any(why in record.getMessage() for record in caplog.records), caplog.text


def test_differences_of_depths_stay_in_float32(build, batch, dictionary):
    """Their maps are not plain ones."""
    model = moved(shared(build, dtype=torch.float32, depth_lora_rank=2, **WIDE))
    before = words(search([model], dictionary, batch))
    with pytest.raises(UsageError, match="no plain linear map"):
        model.int8()
    assert words(search([model], dictionary, batch)) == before


def test_language_models(build, dictionary, monkeypatch, made):  # noqa: F811
    sizes = {name: value for name, value in WIDE.items() if name.startswith("decoder_")}
    flags = {"decoder_layers": 4, "decoder_unique_layers": 2, "decoder_attention_heads": 2, **sizes}
    model = build("shared_transformer_lm", dtype=torch.float32, **flags)
    model.decoder.output_projection.weight.data *= 3
    model = model.int8()
    batch = {"src_tokens": torch.randint(4, 44, (5, 6), generator=torch.Generator().manual_seed(1))}
    batch |= {"src_lengths": torch.full((5,), 6), "prev_output_tokens": batch["src_tokens"]}
    monkeypatch.delenv(KERNELS, raising=False)
    prefix = batch["src_tokens"]
    theirs = search([model], dictionary, batch, beam=1, prefix_tokens=prefix)
    ours = search([model], dictionary, batch, beam=1, prefix_tokens=prefix, self_speculative=2, draft=3)
    assert words(ours) == words(theirs) and made[0].tally.rounds
    assert any(type(each) is Int8Linear for each in model.decoder.modules())

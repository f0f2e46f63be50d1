"""BERT, RoBERTa and Transkimmer folders into ``transkimmer``, against the definition in plain torch.

The definition is in float64; fairseq computes GELU in single precision.
"""

import json
import runpy
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.interop import bert, load_checkpoint
from fairseq_adaptive.interop.definitions.bert import encode
from fairseq_adaptive.models.transkimmer import TranskimmerModel
from fairseq.data import Dictionary
from interop.original_bert import CONFIG, LAYERS, ROBERTA, SENTENCE, WORDS, random_weights, symbols, write


def load(state, dictionary, **flags):
    args = (
        Namespace(**{**vars(Namespace(**dict(vars(state["cfg"]["model"])))), **flags})
        if isinstance(state["cfg"]["model"], Namespace)
        else Namespace(**{**state["cfg"]["model"], **flags})
    )
    model = TranskimmerModel.build_model(args, Namespace(source_dictionary=dictionary))
    model.register_span_head()
    model.load_state_dict(dict(state["model"]), strict=True)
    return model.double().eval()


@torch.no_grad()
@pytest.mark.parametrize("config", (CONFIG, ROBERTA), ids=("bert", "roberta"))
@pytest.mark.parametrize("skims", (False, True), ids=("plain", "skimming"))
def test_states_equal_the_definition(tmp_path, config, skims):
    weights, kind = random_weights(config, skims), config["model_type"]
    args = write(tmp_path / "theirs", config, weights)
    args.format = "transkimmer" if skims else args.format
    state, dictionary = bert.convert(args)
    model = load(state, dictionary, no_skimming=not skims, load_checkpoint_heads=True)
    words = symbols(kind)
    start, end = words.index(bert.SPECIAL[kind][0]), words.index(bert.SPECIAL[kind][2])
    torch.manual_seed(3)
    ids = torch.randint(14, WORDS - 1, (12,))
    ids[0], ids[5], ids[11] = start, end, end
    ours = torch.full((2, 14), dictionary.pad())
    renamed = dict(zip(bert.SPECIAL[kind], ("<s>", "<pad>", "</s>", "<unk>", "<mask>")))
    names = [renamed.get(words[n], words[n]) for n in ids]
    ours[0, :12] = torch.tensor([dictionary.index(name) for name in names])
    ours[1, :3] = ours[0, :3]
    segments = (torch.arange(12) > 5).long() * (kind == "bert")
    expected, depths, _, _ = encode(weights, config, ids, segments)
    found = model(ours, features_only=True)[0]
    torch.testing.assert_close(found[0, :12], expected, rtol=0, atol=5e-6)
    assert expected.std() > 0.1
    if skims:
        assert depths[0] == LAYERS and 0 < depths[1:].float().mean() < LAYERS
    short = encode(weights, config, ids[:3], segments[:3]).states
    torch.testing.assert_close(found[1, :3], short, rtol=0, atol=5e-6)

    # heads
    prefix = "cls.predictions.transform." if kind == "bert" else "lm_head."
    assert torch.equal(state["model"]["encoder.lm_head.dense.weight"], weights[prefix + "dense.weight"])
    bias = weights["cls.predictions.bias" if kind == "bert" else "lm_head.bias"]
    assert state["model"]["encoder.lm_head.bias"][2] == bias[end]
    dense, out = SENTENCE[kind]
    pooled = torch.tanh(F.linear(expected[0], *(weights[f"{dense}.{each}"].double() for each in ("weight", "bias"))))
    logits = F.linear(pooled, *(weights[f"{out}.{each}"].double() for each in ("weight", "bias")))
    found = model(ours, classification_head_name="sentence_classification_head")[0]
    torch.testing.assert_close(found[0], logits, rtol=0, atol=5e-6)
    spans = F.linear(expected, weights["qa_outputs.weight"].double(), weights["qa_outputs.bias"].double())
    torch.testing.assert_close(model(ours, spans=True)[0][0, :, :12].t(), spans, rtol=0, atol=5e-6)


def test_command_writes_what_fairseq_reads(tmp_path, monkeypatch):
    args = write(tmp_path / "theirs", CONFIG, random_weights(CONFIG, head=False))
    monkeypatch.setattr(
        sys,
        "argv",
        ["convert_checkpoint.py", "--format", "bert", "--input", str(args.input), "--output", str(tmp_path / "ours")],
    )
    runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "convert_checkpoint.py"), run_name="__main__")
    dictionary = Dictionary.load(str(tmp_path / "ours" / "dict.txt"))
    assert len(dictionary) == WORDS and dictionary.add_symbol("<mask>") == dictionary.index("<mask>") < WORDS
    state = load_checkpoint(tmp_path / "ours" / "checkpoint.pt")
    assert load(state, dictionary).encoder.sentence_encoder.layers.router is not None


def without(name):
    return lambda config, weights, words: weights.pop(name)


def change(**values):
    return lambda config, weights, words: config.update(values)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (without("bert.encoder.layer.1.output.dense.bias"), "the weights lack encoder.layer.1.output.dense.bias"),
        (change(intermediate_size=16), r"has the shape \(12, 8\), but by config.json it should be \(16, 8\)"),
        (change(num_hidden_layers=2), "the weights hold encoder.layer.2..* there are only 2 layers"),
        (change(model_type="t5"), "model_type t5: only bert and roberta"),
        (change(position_embedding_type="relative_key"), "only absolute can be converted"),
        (change(hidden_act="swish"), "hidden_act swish: known are gelu"),
        (change(vocab_size=31), "the vocabulary has 30 symbols, but the model 31"),
        (lambda c, w, words: words.__setitem__(10, "x"), r"the vocabulary lacks \[CLS\]: is it that of a bert"),
        (lambda c, w, words: words.__setitem__(13, "x"), r"the vocabulary lacks \[MASK\]"),
        (lambda c, w, words: words.__setitem__(3, "##w4"), "symbols twice"),
        (lambda c, w, words: c.pop("hidden_size"), "config.json lacks hidden_size"),
    ],
)
def test_says_what_is_wrong(spoil, message, tmp_path):
    config, words = dict(CONFIG), symbols("bert")
    weights = random_weights(CONFIG)
    args = Namespace(format="bert")
    spoil(config, weights, words)
    if config.get("model_type") == "t5":
        args = write(tmp_path / "theirs", {**config, "model_type": "bert"}, weights, words)
        (tmp_path / "theirs" / "config.json").write_text(json.dumps(config))
    else:
        args = write(tmp_path / "theirs", config, weights, words)
    with pytest.raises(UsageError, match=message):
        bert.convert(args)


@pytest.mark.parametrize(
    "given, message",
    [
        ("roberta", "holds a bert: convert it with --format bert"),
        ("transkimmer", "no skim predictors: .* --format bert"),
    ],
)
def test_the_format_is_checked(given, message, tmp_path):
    args = write(tmp_path / "theirs", CONFIG, random_weights(CONFIG))
    args.format = given
    with pytest.raises(UsageError, match=message):
        bert.convert(args)
    (args.input / "vocab.txt").unlink()
    args.format = "bert"
    with pytest.raises(UsageError, match="neither vocab.txt nor vocab.json"):
        bert.convert(args)


def test_the_word_head_of_roberta_has_gelu_whatever_its_layers_have(tmp_path):
    config = {**ROBERTA, "hidden_act": "relu"}
    args = write(tmp_path / "theirs", config, random_weights(config))
    with pytest.raises(UsageError, match="hidden_act relu, but the word head of a roberta, lm_head, has gelu"):
        bert.convert(args)
    bert.convert(write(tmp_path / "body", config, random_weights(config, head=False)))

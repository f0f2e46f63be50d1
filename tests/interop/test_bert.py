"""BERT, RoBERTa and Transkimmer folders into ``transkimmer``, against a definition in plain torch.

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
from fairseq_adaptive.models.transkimmer import TranskimmerModel
from fairseq.data import Dictionary

DIM, INNER, LAYERS, WORDS = 8, 12, 3, 30
CONFIG = {
    "model_type": "bert",
    "vocab_size": WORDS,
    "hidden_size": DIM,
    "intermediate_size": INNER,
    "hidden_act": "gelu",
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "hidden_dropout_prob": 0.1,
    "layer_norm_eps": 1e-12,
    "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 16,
    "type_vocab_size": 2,
}
ROBERTA = {
    **CONFIG,
    "model_type": "roberta",
    "max_position_embeddings": 18,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
}
LINEARS = {
    "attention.self.query": (DIM, DIM),
    "attention.self.key": (DIM, DIM),
    "attention.self.value": (DIM, DIM),
    "attention.output.dense": (DIM, DIM),
    "intermediate.dense": (INNER, DIM),
    "output.dense": (DIM, INNER),
}


def random_weights(config, skims=False, head=True):
    """Names and shapes as Hugging Face saves them."""
    generator = torch.Generator().manual_seed(1)
    kind, weights = config["model_type"], {}

    def linear(name, *shape):
        weights[name + ".weight"] = torch.randn(shape, generator=generator) / shape[-1] ** 0.5
        weights[name + ".bias"] = torch.randn(shape[0], generator=generator) / 5

    def norm(name):
        weights[name + ".weight"] = 1 + torch.randn(DIM, generator=generator) / 5
        weights[name + ".bias"] = torch.randn(DIM, generator=generator) / 5

    rows = (("word", WORDS), ("position", config["max_position_embeddings"]), ("token_type", config["type_vocab_size"]))
    for name, size in rows:
        weights[f"{kind}.embeddings.{name}_embeddings.weight"] = torch.randn(size, DIM, generator=generator)
    norm(f"{kind}.embeddings.LayerNorm")
    for number in range(LAYERS):
        prefix = f"{kind}.encoder.layer.{number}."
        for name, shape in LINEARS.items():
            linear(prefix + name, *shape)
        norm(prefix + "attention.output.LayerNorm"), norm(prefix + "output.LayerNorm")
        if skims:
            prefix = f"{kind}.encoder.skim_predictors.{number}.predictor."
            norm(prefix + "0"), norm(prefix + "2"), linear(prefix + "1", DIM, DIM), linear(prefix + "4", 2, DIM)
    if head:
        names = bert._HEADS[kind]
        linear(names["dense"], DIM, DIM), norm(names["layer_norm"])
        weights[names["bias"][0]] = torch.randn(WORDS, generator=generator)
        linear("qa_outputs", 2, DIM)
        dense, out = bert._CLASSIFIER[kind]
        linear(f"{kind}.{dense}" if kind == "bert" else dense, DIM, DIM), linear(out, 3, DIM)
    return weights


def definition(weights, config, ids, segments):
    """States T x C of one sequence and how many layers kept each token; attention is over kept tokens alone."""
    kind, eps = config["model_type"], config["layer_norm_eps"]
    w = {name.removeprefix(kind + "."): tensor.double() for name, tensor in weights.items()}

    def linear(name, x):
        return F.linear(x, w[name + ".weight"], w[name + ".bias"])

    def norm(name, x, eps=eps):
        return F.layer_norm(x, x.shape[-1:], w[name + ".weight"], w[name + ".bias"], eps)

    word, position, types = (w[f"embeddings.{name}_embeddings.weight"] for name in ("word", "position", "token_type"))
    first = 2 if kind == "roberta" else 0
    x = norm("embeddings.LayerNorm", word[ids] + position[first : first + len(ids)] + types[segments])
    kept, depths = torch.ones(len(ids), dtype=torch.bool), torch.zeros(len(ids), dtype=torch.long)
    for number in range(LAYERS):
        predictor, layer = f"encoder.skim_predictors.{number}.predictor.", f"encoder.layer.{number}."
        if predictor + "0.weight" in w:
            scores = linear(predictor + "1", norm(predictor + "0", x, 1e-5))
            scores = linear(predictor + "4", F.gelu(norm(predictor + "2", scores, 1e-5)))
            kept = kept & (scores[:, 1] >= scores[:, 0])
            kept[0] = True
        depths += kept
        y = x[kept]
        q, k, v = (
            linear(f"{layer}attention.self.{each}", y).view(-1, 2, DIM // 2).transpose(0, 1)
            for each in ("query", "key", "value")
        )
        a = (q @ k.transpose(1, 2) / (DIM // 2) ** 0.5).softmax(-1) @ v
        a = linear(layer + "attention.output.dense", a.transpose(0, 1).flatten(1))
        y = norm(layer + "attention.output.LayerNorm", y + a)
        b = linear(layer + "output.dense", F.gelu(linear(layer + "intermediate.dense", y)))
        x = x.clone()
        x[kept] = norm(layer + "output.LayerNorm", y + b)
    return x, depths


def symbols(kind):
    special = bert.SPECIAL[kind]
    if kind == "roberta":
        return [*special[:4], *(f"Ġw{number}" for number in range(WORDS - 5)), special[4]]
    words = [f"##w{number}" for number in range(WORDS)]
    for number, symbol in zip((10, 0, 11, 12, 13), special):
        words[number] = symbol
    return words


def write(folder, config, weights, words=None):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(weights, folder / "pytorch_model.bin")
    words = words or symbols(config["model_type"])
    if config["model_type"] == "bert":
        (folder / "vocab.txt").write_text("".join(word + "\n" for word in words))
    else:
        (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    return Namespace(format=config["model_type"], input=folder, vocab=None)


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
    expected, depths = definition(weights, config, ids, segments)
    found = model(ours, features_only=True)[0]
    torch.testing.assert_close(found[0, :12], expected, rtol=0, atol=5e-6)
    assert expected.std() > 0.1
    if skims:
        assert depths[0] == LAYERS and 0 < depths[1:].float().mean() < LAYERS
    short, _ = definition(weights, config, ids[:3], segments[:3])
    torch.testing.assert_close(found[1, :3], short, rtol=0, atol=5e-6)

    # heads
    prefix = "cls.predictions.transform." if kind == "bert" else "lm_head."
    assert torch.equal(state["model"]["encoder.lm_head.dense.weight"], weights[prefix + "dense.weight"])
    bias = weights["cls.predictions.bias" if kind == "bert" else "lm_head.bias"]
    assert state["model"]["encoder.lm_head.bias"][2] == bias[end]
    dense, out = bert._CLASSIFIER[kind]
    dense = f"bert.{dense}" if kind == "bert" else dense
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

"""What decoding.py gives to Marian: the names that Marian 1.12.42 writes itself, and maps that compute fairseq's encoder."""

import argparse
import json
import sys

import numpy as np
import pytest
import torch

from fairseq_adaptive.interop import unroll_checkpoint

WIDTH, FFN, HEADS, DEPTHS = 16, 32, 2, 3
SIZES = {"embed_dim": WIDTH, "ffn_embed_dim": FFN, "attention_heads": HEADS, "layers": DEPTHS, "unique_layers": 2}
ATTENTION = {
    **{f"W{letter}": (WIDTH, WIDTH) for letter in "qkvo"},
    **{f"b{letter}": (1, WIDTH) for letter in "qkvo"},
    "Wo_ln_scale": (1, WIDTH),
    "Wo_ln_bias": (1, WIDTH),
}
FEED_FORWARD = {
    "W1": (WIDTH, FFN),
    "b1": (1, FFN),
    "W2": (FFN, WIDTH),
    "b2": (1, WIDTH),
    "ffn_ln_scale": (1, WIDTH),
    "ffn_ln_bias": (1, WIDTH),
}


@pytest.fixture
def plain(build):
    """A model whose layers are shared, and its checkpoint without sharing."""

    def make(**flags):
        sizes = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in SIZES.items()}
        flags = {**sizes, "share_all_embeddings": True, "layer_sharing": "cycle", **flags}
        model = build("shared_transformer", dtype=torch.float32, **flags).eval()
        given = argparse.Namespace(arch="shared_transformer", _name="shared_transformer", **flags)
        cfg = {
            "common": {},
            "model": given,
            "task": {"_name": "translation", "source_lang": "src", "target_lang": "tgt"},
        }
        return model, unroll_checkpoint({"args": None, "cfg": cfg, "model": model.state_dict(), "extra_state": {}})

    return make


def test_names_and_sizes(script, plain):
    found = script("marian").tensors(plain()[1])
    expected = {"Wemb": (len(found["Wemb"]), WIDTH), "decoder_ff_logit_out_b": (1, len(found["Wemb"]))}
    for side, attentions in (("encoder", ("self",)), ("decoder", ("self", "context"))):
        for depth in range(1, DEPTHS + 1):
            for name in attentions:
                expected.update({f"{side}_l{depth}_{name}_{each}": size for each, size in ATTENTION.items()})
            expected.update({f"{side}_l{depth}_ffn_{each}": size for each, size in FEED_FORWARD.items()})
    assert {name: each.shape for name, each in found.items()} == expected


def norm(x, found, name):
    mean, deviation = x.mean(-1, keepdims=True), np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return (x - mean) / deviation * found[f"{name}_ln_scale"] + found[f"{name}_ln_bias"]


def encoder(found, x):
    """Marian's encoder (src/models/transformer.h, post-processing "dan") of one sentence, T x C."""
    for depth in range(1, DEPTHS + 1):
        own = f"encoder_l{depth}_self"
        q, k, v = ((x @ found[f"{own}_W{each}"] + found[f"{own}_b{each}"]).reshape(len(x), HEADS, -1) for each in "qkv")
        weights = np.exp(np.einsum("thd,shd->hts", q, k) / np.sqrt(WIDTH / HEADS))
        weights /= weights.sum(-1, keepdims=True)
        attended = np.einsum("hts,shd->thd", weights, v).reshape(x.shape) @ found[f"{own}_Wo"] + found[f"{own}_bo"]
        x = norm(x + attended, found, f"{own}_Wo")
        feed = f"encoder_l{depth}_ffn"
        hidden = np.maximum(x @ found[f"{feed}_W1"] + found[f"{feed}_b1"], 0)
        x = norm(x + hidden @ found[f"{feed}_W2"] + found[f"{feed}_b2"], found, f"{feed}_ffn")
    return x


def test_maps_compute_the_encoder_of_fairseq(script, plain, dictionary):
    model, state = plain()
    for each in model.parameters():  # biases and norms that are not 0 and 1
        torch.nn.init.normal_(each, 0.0 if each.ndim > 1 else 0.5, 0.3)
    state["model"].update({name: each for name, each in model.state_dict().items() if "layers" not in name})
    for side in ("encoder", "decoder"):
        for depth in range(DEPTHS):
            layer = getattr(model, side).layers[depth % 2]
            state["model"].update({f"{side}.layers.{depth}.{name}": each for name, each in layer.state_dict().items()})
    found = {name: each.astype(np.float64) for name, each in script("marian").tensors(state).items()}
    tokens = torch.arange(4, 11)
    with torch.no_grad():
        expected = model.encoder(tokens[None], torch.tensor([7]))["encoder_out"][0][:, 0].numpy()
        places = model.encoder.embed_positions(tokens[None])[0].double().numpy()  # Marian's start 2 earlier
    x = encoder(found, found["Wemb"][tokens - 2] * np.sqrt(WIDTH) + places)
    np.testing.assert_allclose(x, expected, rtol=1e-4, atol=1e-4)


def test_files(script, plain, dictionary, tmp_path):
    """The settings end with the zero that C++ wants, and words have the numbers of their rows."""
    model, state = plain()
    script("marian").write_model(state, dictionary, tmp_path / "model")
    with np.load(tmp_path / "model" / "model.npz") as stored:
        about = stored["special:model.yml"].tobytes()
        assert about[-1:] == b"\0" and json.loads(about[:-1])["dim-vocabs"] == [len(stored["Wemb"])] * 2
        rows = stored["Wemb"]
    lines = (tmp_path / "model" / "words.yml").read_text().splitlines()
    words = {json.loads(word): int(number) for word, number in (line.rsplit(": ", 1) for line in lines)}
    assert words["</s>"] == 0 and words["<unk>"] == 1 and len(words) == len(rows) == len(dictionary) - 2
    for word in (dictionary[4], dictionary[len(dictionary) - 1]):
        expected = model.encoder.embed_tokens.weight[dictionary.index(word)].detach().numpy()
        np.testing.assert_array_equal(rows[words[word]], expected)


@pytest.mark.parametrize(
    "flags, why",
    (
        ({"encoder_normalize_before": True}, "encoder_normalize_before = True"),
        ({"share_all_embeddings": False}, "share_all_embeddings = False"),
        ({"activation_fn": "gelu"}, "activation_fn = gelu"),
        ({"decoder_ffn_embed_dim": 24}, "encoder and decoder have other sizes"),
    ),
    ids=lambda each: "-".join(each) if isinstance(each, dict) else None,
)
def test_models_that_marian_has_not(script, plain, monkeypatch, flags, why):
    marian = script("marian")
    monkeypatch.setitem(sys.modules, "pymarian", argparse)  # as if it were there
    assert why in marian.obstacle(plain(**flags)[1])
    assert marian.obstacle(plain()[1]) == ""
    monkeypatch.setitem(sys.modules, "pymarian", None)
    assert marian.obstacle(plain()[1]) == "pymarian is not installed"


def test_seconds_are_those_of_as_many_words(script, capsys):
    decoding, seconds = script("decoding"), script("record").Seconds
    words = argparse.Namespace(string=lambda tokens: " ".join("abcdef"[number] for number in tokens))
    expected = [[{"tokens": [0, 1, 2]}], [{"tokens": [3, 4, 5, 5, 5]}]]  # 8 words and 2 ends
    found = decoding.per_word([seconds(4.0, 2.0)], [["a", "b", "c"], ["d"] * 15], expected, words)
    assert found == [seconds(2.0, 1.0)]
    assert "1 of 2 best hypotheses are stock's, 18 words and 8" in capsys.readouterr().out

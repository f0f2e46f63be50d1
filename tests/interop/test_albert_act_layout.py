"""The published layout of ALBERT-ACT: into fairseq and back, the hub's interface, and a definition in plain torch."""

import json
import runpy
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.hub import AlbertActModel
from fairseq_adaptive.interop import load_checkpoint
from fairseq_adaptive.interop.albert_act import convert

CONFIG = {
    "vocab_size": 60, "embedding_size": 8, "hidden_size": 16, "num_hidden_layers": 7, "num_attention_heads": 2,
    "intermediate_size": 32, "hidden_act": "gelu", "hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0,
    "classifier_dropout_prob": 0.1, "max_position_embeddings": 40, "act_epsilon": 0.01, "type_vocab_size": 2,
    "layer_norm_eps": 1e-12, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3,
}


def published_weights(seed=1):
    """Names and shapes as the public model saves them."""
    generator = torch.Generator().manual_seed(seed)
    linears = {"encoder.embedding_hidden_mapping_in": (16, 8), "pooler": (16, 16)}
    layer = {f"attention.{name}": (16, 16) for name in ("query", "key", "value", "dense")}
    layer.update({"ffn": (32, 16), "ffn_output": (16, 32), "act.dense": (1, 16)})
    linears.update({f"encoder.albert_layer.{name}": shape for name, shape in layer.items()})
    weights = {f"embeddings.{name}_embeddings.weight": torch.randn(size, 8, generator=generator)
               for name, size in (("word", 60), ("position", 40), ("token_type", 2))}
    for name, shape in linears.items():
        weights[f"{name}.weight"] = torch.randn(shape, generator=generator) / shape[1] ** 0.5
        weights[f"{name}.bias"] = torch.randn(shape[0], generator=generator) / 5
    weights["encoder.albert_layer.act.dense.bias"] -= 1.5
    norms = (("embeddings.LayerNorm", 8), ("encoder.albert_layer.LayerNorm", 16),
             ("encoder.albert_layer.full_layer_layer_norm", 16))
    for name, width in norms:
        weights[f"{name}.weight"] = 1 + torch.randn(width, generator=generator) / 5
        weights[f"{name}.bias"] = torch.randn(width, generator=generator) / 5
    return weights


def definition(weights, ids, segments):
    """States and updates of one sequence, T x C and T, written after the paper, in float64."""
    w = {name: tensor.double() for name, tensor in weights.items()}

    def linear(name, x):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-12)

    tables = [w[f"embeddings.{name}_embeddings.weight"] for name in ("word", "position", "token_type")]
    x = tables[0][ids] + tables[1][: len(ids)] + tables[2][segments]
    x, layer = linear("encoder.embedding_hidden_mapping_in", norm("embeddings.LayerNorm", x)), "encoder.albert_layer."
    h, r, n = (torch.zeros(len(ids)).double() for _ in range(3))
    while ((h < 0.99) & (n < 7)).any():
        heads = (linear(f"{layer}attention.{name}", x).view(-1, 2, 8) for name in ("query", "key", "value"))
        q, k, v = (each.transpose(0, 1) for each in heads)
        a = ((q @ k.transpose(1, 2)) / 8**0.5).softmax(-1) @ v
        a = norm(layer + "LayerNorm", x + linear(layer + "attention.dense", a.transpose(0, 1).flatten(1)))
        y = linear(layer + "ffn_output", F.gelu(linear(layer + "ffn", a)))
        y = norm(layer + "full_layer_layer_norm", y + a)
        p, running = torch.sigmoid(linear(layer + "act.dense", y))[:, 0], h < 1
        new = running & (h + p > 0.99)
        still = running & ~new
        h = h + p * still
        r = r + (1 - h) * new
        u = (p * still + r * new)[:, None]
        h, n, x = h + r * new, n + running, y * u + x * (1 - u)
    return x, n, r


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "published").mkdir()
    (tmp_path / "published" / "config.json").write_text(json.dumps(CONFIG))
    torch.save(published_weights(), tmp_path / "published" / "pytorch_model.bin")
    return tmp_path / "published"


@pytest.fixture(scope="module")
def spm(tmp_path_factory):
    """A SentencePiece model of 60 pieces with the special pieces of ALBERT."""
    from sentencepiece import SentencePieceTrainer

    base = tmp_path_factory.mktemp("spm")
    (base / "text").write_text("\n".join("the quick brown fox jumps over a lazy dog again and again".split()) + "\n")
    SentencePieceTrainer.train(
        input=str(base / "text"), model_prefix=str(base / "spiece"), vocab_size=60, model_type="bpe", pad_id=0,
        unk_id=1, bos_id=-1, eos_id=-1, pad_piece="<pad>", unk_piece="<unk>", control_symbols="[CLS],[SEP],[MASK]",
        hard_vocab_limit=False, minloglevel=2)
    return base / "spiece.model"


@torch.no_grad()
def test_hub_equals_the_definition(folder):
    model = AlbertActModel.from_pretrained(folder)
    torch.manual_seed(2)
    ids, mask = torch.randint(4, 60, (3, 12)), torch.ones(3, 12, dtype=torch.long)
    segments = (torch.arange(12) > 5).long().expand(3, 12)
    mask[1, 7:] = mask[2, 4:] = 0
    out = model(ids, mask, segments)
    assert out.last_hidden_state.shape == (3, 12, 16) and out.updates.shape == out.remainders.shape == (3, 12)
    assert out.updates.unique().numel() > 3
    for row, length in enumerate((12, 7, 4)):
        states, updates, remainders = definition(published_weights(), ids[row, :length], segments[row, :length])
        torch.testing.assert_close(out.last_hidden_state[row, :length], states.float(), rtol=0, atol=1e-5)
        torch.testing.assert_close(out.remainders[row, :length], remainders.float(), rtol=0, atol=1e-5)
        assert torch.equal(out.updates[row, :length], updates.long())
        assert not out.updates[row, length:].any() and not out.remainders[row, length:].any()
        weights = published_weights()
        pooled = torch.tanh(states[0] @ weights["pooler.weight"].double().T + weights["pooler.bias"])
        torch.testing.assert_close(out.pooler_output[row], pooled.float(), rtol=0, atol=1e-5)


def run_script(monkeypatch, *args):
    """scripts/convert_checkpoint.py, in this process."""
    monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", "--format", "albert_act", *map(str, args)])
    runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "convert_checkpoint.py"), run_name="__main__")


def test_to_fairseq_and_back(folder, spm, tmp_path, monkeypatch):
    run_script(monkeypatch, "--input", folder, "--spm", spm, "--output", tmp_path / "ours")
    state = load_checkpoint(tmp_path / "ours" / "checkpoint.pt")
    words = (tmp_path / "ours" / "dict.txt").read_text().splitlines()
    assert words[0] == "<mask> 1" and len(words) == 56
    word = published_weights()["embeddings.word_embeddings.weight"]
    assert torch.equal(state["model"]["encoder.embed_tokens.weight"][:5], word[[2, 0, 3, 1, 4]])
    run_script(monkeypatch, "--input", tmp_path / "ours" / "checkpoint.pt", "--output", tmp_path / "back")
    back = torch.load(tmp_path / "back" / "pytorch_model.bin")
    for name, tensor in published_weights().items():
        assert torch.equal(back["albert." + name], tensor), name
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {name: config[name] for name in CONFIG} == CONFIG
    ids = torch.randint(4, 60, (2, 9))
    with torch.no_grad():
        first, second = (AlbertActModel.from_pretrained(str(path))(ids) for path in (folder, tmp_path / "back"))
    assert torch.equal(first.last_hidden_state, second.last_hidden_state)


def _change(folder, **values):
    (folder / "config.json").write_text(json.dumps({**CONFIG, **values}))


@pytest.mark.parametrize(
    "values, message",
    [
        ({"hidden_size": 32}, r"has the shape \(16, 8\), but by config.json it should be \(32, 8\)"),
        ({"num_hidden_groups": 2}, "num_hidden_groups 2, but only 1"),
        ({"act_epsilon": 1.5}, "above 0 and at most 1"),
        ({"num_hidden_layers": 0}, "at least 1 layer"),
        ({"hidden_act": "swish"}, "hidden_act swish"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_refuses_what_does_not_fit(folder, values, message):
    _change(folder, **values)
    with pytest.raises(UsageError, match=message):
        AlbertActModel.from_pretrained(folder)


def test_refuses_other_tokenizers_and_folders(folder, spm, tmp_path):
    with pytest.raises(UsageError, match="not that of this model"):
        AlbertActModel.from_pretrained(folder)(torch.tensor([[2, 60, 3]]))
    _change(folder, vocab_size=59)
    with pytest.raises(UsageError, match="60 pieces, but the model a vocabulary of 59"):
        convert(Namespace(input=folder, spm=spm))
    with pytest.raises(UsageError, match="no SentencePiece model"):
        convert(Namespace(input=folder, spm=None))
    with pytest.raises(UsageError):
        AlbertActModel.from_pretrained(str(tmp_path / "nowhere"))

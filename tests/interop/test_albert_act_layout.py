"""The published layout of ALBERT-ACT: into fairseq and back, the hub's interface, and a definition in plain torch."""

import json
import os
import runpy
import shutil
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
from fairseq_adaptive.report.depth_map import depth_tables
from threads import assert_threads_equal_one

CONFIG = {
    "vocab_size": 60,
    "embedding_size": 8,
    "hidden_size": 16,
    "num_hidden_layers": 7,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0,
    "attention_probs_dropout_prob": 0,
    "classifier_dropout_prob": 0.1,
    "max_position_embeddings": 40,
    "act_epsilon": 0.01,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}


def published_weights(seed=1):
    """Names and shapes as the public model saves them."""
    generator = torch.Generator().manual_seed(seed)
    linears = {"encoder.embedding_hidden_mapping_in": (16, 8), "pooler": (16, 16)}
    layer = {f"attention.{name}": (16, 16) for name in ("query", "key", "value", "dense")}
    layer.update({"ffn": (32, 16), "ffn_output": (16, 32), "act.dense": (1, 16)})
    linears.update({f"encoder.albert_layer.{name}": shape for name, shape in layer.items()})
    weights = {
        f"embeddings.{name}_embeddings.weight": torch.randn(size, 8, generator=generator)
        for name, size in (("word", 60), ("position", 40), ("token_type", 2))
    }
    for name, shape in linears.items():
        weights[f"{name}.weight"] = torch.randn(shape, generator=generator) / shape[1] ** 0.5
        weights[f"{name}.bias"] = torch.randn(shape[0], generator=generator) / 5
    weights["encoder.albert_layer.act.dense.bias"] -= 1.5
    norms = (
        ("embeddings.LayerNorm", 8),
        ("encoder.albert_layer.LayerNorm", 16),
        ("encoder.albert_layer.full_layer_layer_norm", 16),
    )
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
        input=str(base / "text"),
        model_prefix=str(base / "spiece"),
        vocab_size=60,
        model_type="bpe",
        pad_id=0,
        unk_id=1,
        bos_id=-1,
        eos_id=-1,
        pad_piece="<pad>",
        unk_piece="<unk>",
        control_symbols="[CLS],[SEP],[MASK]",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return base / "spiece.model"


@torch.no_grad()
def test_hub_in_int8(folder):
    ids = torch.randint(4, 60, (2, 12), generator=torch.Generator().manual_seed(2))
    made = AlbertActModel.from_pretrained(folder, int8=True)
    plain, small = AlbertActModel.from_pretrained(folder)(ids), made(ids)
    assert made.model.maps_in_int8 and not torch.equal(plain.last_hidden_state, small.last_hidden_state)
    near = (plain.updates - small.updates).abs() <= 1
    assert near.float().mean() > 0.8


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


TEXTS = ["The quick brown FOX", " a  lázy dog jumps again and again "]


@pytest.mark.parametrize(
    "options, prepared",
    (
        (None, ["the quick brown fox", "a lazy dog jumps again and again"]),
        ({"do_lower_case": False}, ["The quick brown FOX", "a lazy dog jumps again and again"]),
        ({"keep_accents": True}, ["the quick brown fox", "a lázy dog jumps again and again"]),
    ),
)
@torch.no_grad()
def test_hub_reads_text(folder, spm, options, prepared):
    from sentencepiece import SentencePieceProcessor

    shutil.copy(spm, folder / "spiece.model")
    if options is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(options))
    model, pieces = AlbertActModel.from_pretrained(folder), SentencePieceProcessor(model_file=str(spm))
    rows = [[2, *pieces.encode(text), 3] for text in prepared]
    inputs = model.encode(TEXTS)
    for row, ids, mask in zip(rows, inputs["input_ids"].tolist(), inputs["attention_mask"].tolist()):
        padding = len(ids) - len(row)
        assert ids == row + [0] * padding and mask == [1] * len(row) + [0] * padding

    updates, sentences = model(**inputs).updates, model.depths(TEXTS)
    for row, text, sentence, counts in zip(rows, prepared, sentences, updates):
        assert sentence.tokens == ["[CLS]", *pieces.encode(text, out_type=str), "[SEP]"]
        assert sentence.depths == counts[: len(row)].tolist() and sentence.limit == 7
    assert updates.unique().numel() > 3  # 0 at padding
    tables = depth_tables(sentences)
    for name, place in ("[CLS]", 0), ("[SEP]", -1):
        assert tables["token type"][name] == (2, sum(each.depths[place] for each in sentences) / 2)
    inner = [depth for each in sentences for depth in each.depths[1:-1]]
    for table in "frequency rank", "part of the text":
        total = sum(number * mean for number, mean in tables[table].values())
        assert total == pytest.approx(sum(inner)) and sum(number for number, _ in tables[table].values()) == len(inner)
    with pytest.raises(UsageError, match="a text has 42 tokens, but the model reads 40 at most"):
        model.encode(["x" * 39])


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """An empty cache of the Hugging Face hub, without network; ``hub_cache(name, folder)`` fills it."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def fill(name, folder):
        place = tmp_path / "cache" / f"models--{name.replace('/', '--')}"
        shutil.copytree(folder, place / "snapshots" / "0123")
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text("0123")

    return fill


def test_hub_names(folder, hub_cache, monkeypatch):
    hub_cache("someone/albert-act", folder)
    ids = torch.tensor([[2, 7, 9, 3]])
    with torch.no_grad():
        named, local = (AlbertActModel.from_pretrained(name)(ids) for name in ("someone/albert-act", str(folder)))
    assert torch.equal(named.last_hidden_state, local.last_hidden_state)
    with pytest.raises(UsageError, match="^someone/else is no folder, and does not come from .* hub: .*cache"):
        AlbertActModel.from_pretrained("someone/else")
    with pytest.raises(UsageError, match="^no name! is no folder, .* hub: Repo id"):
        AlbertActModel.from_pretrained("no name!")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UsageError, match="there is no folder someone/albert-act; to load it .* pip install"):
        AlbertActModel.from_pretrained("someone/albert-act")


def _published_base():
    """The folder of asi/albert-act-base where it is on this machine, else None."""
    if "ALBERT_ACT_BASE" in os.environ:
        return os.environ["ALBERT_ACT_BASE"]
    try:
        from huggingface_hub import snapshot_download

        return snapshot_download("asi/albert-act-base", local_files_only=True)
    except (ImportError, OSError):
        return None


@torch.no_grad()
def test_sentence_of_the_model_card():
    """Its 14 words are one piece each; the numbers are those of https://huggingface.co/asi/albert-act-base."""
    folder = _published_base()
    if folder is None:
        pytest.skip(
            "the weights of asi/albert-act-base are not here: set ALBERT_ACT_BASE to their folder "
            "(config.json, pytorch_model.bin, spiece.model), or have them in the cache of huggingface_hub"
        )
    model = AlbertActModel.from_pretrained(folder)
    inputs = model.encode(["a lump in the middle of the monkeys stirred and then fell quiet ."])
    assert model(**inputs).updates.tolist() == [[15, 9, 10, 7, 3, 8, 5, 7, 12, 10, 6, 8, 8, 9, 5, 8]]


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
    run_script(monkeypatch, "--input", tmp_path / "ours" / "checkpoint.pt", "--spm", spm, "--output", tmp_path / "back")
    back = torch.load(tmp_path / "back" / "pytorch_model.bin")
    for name, tensor in published_weights().items():
        assert torch.equal(back["albert." + name], tensor), name
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {name: config[name] for name in CONFIG} == CONFIG
    ids = torch.randint(4, 60, (2, 9))
    with torch.no_grad():
        first, second = (AlbertActModel.from_pretrained(str(path))(ids) for path in (folder, tmp_path / "back"))
    assert torch.equal(first.last_hidden_state, second.last_hidden_state)
    tokenizer = AlbertActModel.from_pretrained(tmp_path / "back").tokenizer
    assert "".join(tokenizer.tokenize("Áb")) == "▁Áb"  # the checkpoint has read text as it is


def _change(folder, **values):
    (folder / "config.json").write_text(json.dumps({**CONFIG, **values}))


@pytest.mark.parametrize(
    "values, message",
    [
        ({"hidden_size": 32}, r"has the shape \(16, 8\), but by config.json it should be \(32, 8\)"),
        ({"num_hidden_groups": 2}, "num_hidden_groups 2, but only 1"),
        ({"act_epsilon": 1.5}, "act_epsilon in config.json is 1.5"),
        ({"num_hidden_layers": 0}, "num_hidden_layers in config.json is 0"),
        ({"hidden_act": "swish"}, "hidden_act swish"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_refuses_what_does_not_fit(folder, values, message):
    _change(folder, **values)
    with pytest.raises(UsageError, match=message):
        AlbertActModel.from_pretrained(folder)


def test_refuses_other_tokenizers_and_folders(folder, spm, tmp_path):
    with pytest.raises(UsageError, match="came without a tokenizer: put its spiece.model into its folder"):
        AlbertActModel.from_pretrained(folder).encode(["a dog"])
    with pytest.raises(UsageError, match="not that of this model"):
        AlbertActModel.from_pretrained(folder)(torch.tensor([[2, 60, 3]]))
    _change(folder, vocab_size=59)
    with pytest.raises(UsageError, match="60 pieces, but the model a vocabulary of 59"):
        convert(Namespace(input=folder, spm=spm))
    with pytest.raises(UsageError, match="no SentencePiece model"):
        convert(Namespace(input=folder, spm=None))
    with pytest.raises(UsageError):
        AlbertActModel.from_pretrained(str(tmp_path / "nowhere"))
    shutil.copy(spm, folder / "spiece.model")
    with pytest.raises(UsageError, match="60 pieces, but the model a vocabulary of 59"):
        AlbertActModel.from_pretrained(folder)
    (folder / "spiece.model").write_text("no model")
    with pytest.raises(UsageError, match="is no SentencePiece model"):
        AlbertActModel.from_pretrained(folder)


@torch.no_grad()
def test_hub_serves_several_threads(folder):
    model = AlbertActModel.from_pretrained(folder)
    torch.manual_seed(2)
    inputs = [torch.randint(4, 60, (2, length)) for length in (12, 7, 9, 5)]

    def same(one, other):
        return (
            one.updates.shape == other.updates.shape
            and torch.equal(one.updates, other.updates)
            and torch.allclose(one.last_hidden_state, other.last_hidden_state, atol=1e-6)
            and torch.equal(one.trace.updates, other.trace.updates)
        )

    assert_threads_equal_one(model, inputs, same)

"""The published layout of ALBERT-ACT: into fairseq and back, the hub's interface, and the definition in plain torch."""

import json
import os
import runpy
import shutil
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.hub import AlbertActModel
from fairseq_adaptive.interop import load_checkpoint
from fairseq_adaptive.interop.albert_act import convert
from fairseq_adaptive.interop.definitions.albert_act import encode
from fairseq_adaptive.report.depth_map import depth_tables
from interop.original_albert_act import CONFIG, published_weights
from threads import assert_threads_equal_one


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "published").mkdir()
    (tmp_path / "published" / "config.json").write_text(json.dumps(CONFIG))
    torch.save(published_weights(), tmp_path / "published" / "pytorch_model.bin")
    return tmp_path / "published"


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
        states, updates, remainders, _ = encode(published_weights(), CONFIG, ids[row, :length], segments[row, :length])
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

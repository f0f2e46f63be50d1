"""examples/pretraining on a small text: pieces, both phases of the recipe, exact resume, export, errors."""

import argparse
import random
import re
import shutil

import pytest
import sentencepiece
import torch
from cli.helpers import run
from cli.wmt14 import ROOT, bash
from fairseq.data import Dictionary, data_utils

from fairseq_adaptive.interop import albert_act

PREPARE, TRAIN = (ROOT / "examples" / "pretraining" / name for name in ("prepare.sh", "train.sh"))
# update-freq is given: the recipe's 4,096 texts an update are too many here
TINY = (
    "--encoder-embed-dim 16 --encoder-ffn-embed-dim 32 --encoder-attention-heads 2 --encoder-input-dim 8 --cpu "
    "--num-workers 0 --update-freq 1 --max-update 4 --total-num-update 4 --warmup-updates 1 "
    "--save-interval-updates 2 --log-interval 1 --keep-interval-updates -1"
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("pretraining"), random.Random(1)
    (folder / "raw").mkdir()
    words = ["".join(rng.choice("abcdefgh") for _ in range(rng.randint(2, 7))) for _ in range(300)]
    for split, count in (("train", 40), ("valid", 12), ("test", 12)):
        text = "\n".join(
            "".join(
                " ".join(rng.choices(words, k=rng.randint(3, 9))).capitalize() + ".\n"
                for _ in range(rng.randint(1, 12))
            )
            for _ in range(count)
        )
        (folder / "raw" / f"{split}.txt").write_text(text)
    bash(PREPARE, folder / "raw", folder / "out", "--sentencepiece", "200", "--workers", "1")
    return folder


def test_pieces_and_documents(prepared):
    model = sentencepiece.SentencePieceProcessor(model_file=str(prepared / "out" / "sentencepiece.model"))
    assert [model.id_to_piece(number) for number in range(5)] == ["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"]
    dictionary = Dictionary.load(str(prepared / "out" / "bin" / "dict.txt"))
    assert dictionary.symbols == [
        "<s>",
        "<pad>",
        "</s>",
        "<unk>",
        "<mask>",
        *(model.id_to_piece(number) for number in range(5, len(model))),
    ]
    lines = data_utils.load_indexed_dataset(str(prepared / "out" / "bin" / "valid"), dictionary)
    text = ["".join(dictionary[token] for token in line[:-1]).replace("▁", " ").strip() for line in lines]
    assert text == (prepared / "raw" / "valid.txt").read_text().lower().splitlines()


def test_recipe_resume_and_export(prepared, tmp_path):
    whole, half = tmp_path / "whole", tmp_path / "half"
    done = bash(TRAIN, prepared / "out", whole, "albert_act_tiny", *TINY.split(), "--batch-size", "8")
    valid = re.findall(r"valid on 'valid' subset \|(.*)", done.stdout + done.stderr)[-1]
    values = {name: float(value) for name, value in re.findall(r"(\w+) ([\d.]+)", valid)}
    assert 0 <= values["mlm_accuracy"] <= 100 and 20 < values["sop_accuracy"] < 80
    assert values["loss"] == pytest.approx(values["mlm_loss"] + values["sop_loss"], abs=0.2)
    assert values["ppl"] == pytest.approx(2 ** values["mlm_loss"], rel=1e-2) and 1 <= values["depth"] <= 6
    first, second = (torch.load(whole / length / "checkpoint_last.pt", weights_only=False) for length in ("128", "512"))
    weights = [each["model"]["encoder.project_in_dim.weight"] for each in (first, second)]
    assert 0 < (weights[0] - weights[1]).norm() < 0.05 * weights[0].norm()  # 512 went on from 128
    assert second["optimizer_history"][-1]["num_updates"] == 4

    (half / "128").mkdir(parents=True)
    shutil.copy(next((whole / "128").glob("checkpoint_*_2.pt")), half / "128" / "checkpoint_last.pt")
    flags = first["cfg"]["task"], first["cfg"]["criterion"]
    assert flags[0]["tokens_per_sample"] == 128 and flags[1]["time_penalty"] == pytest.approx(128e-3)
    bash(TRAIN, prepared / "out", half, "albert_act_tiny", *TINY.split(), "--batch-size", "8")
    again = torch.load(half / "128" / "checkpoint_last.pt", weights_only=False)
    for name, tensor in first["model"].items():
        assert torch.equal(tensor, again["model"][name]), name

    published = tmp_path / "published"
    albert_act.convert_back(
        argparse.Namespace(
            input=whole / "512" / "checkpoint_last.pt", output=published, spm=prepared / "out" / "sentencepiece.model"
        )
    )
    _, dictionary = albert_act.convert(argparse.Namespace(input=published, spm=None))
    assert dictionary.symbols == Dictionary.load(str(prepared / "out" / "bin" / "dict.txt")).symbols
    shown = run(
        "python",
        ROOT / "scripts" / "plot_depth.py",
        published,
        "--html",
        tmp_path / "depth.html",
        "--table",
        input="A bad cab.\n\nFad.\n",
    )
    assert "| [CLS] | 2 |" in shown.stdout and (tmp_path / "depth.html").read_text().count(" [SEP]</i></bdi>") == 2


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "raw/train.txt is missing or empty"),
        ("é\n\na\n".encode("latin-1"), "raw/train.txt is not UTF-8 text"),
        (b"one line\nand another\n", "raw/train.txt has no empty lines: write one between documents"),
    ],
)
def test_errors(text, message, tmp_path):
    (tmp_path / "raw").mkdir()
    if text is not None:
        for split in "train", "valid", "test":
            (tmp_path / "raw" / f"{split}.txt").write_bytes(text)
    done = bash(PREPARE, "raw", "out", check=False, cwd=tmp_path)
    assert done.returncode == 1 and done.stderr == f"prepare: {message}\n" and not (tmp_path / "out").exists()


def test_usage():
    for script, end in (PREPARE, "converts to it (scripts/convert_checkpoint.py).\n"), (TRAIN, "add --halting none.\n"):
        done = bash(script, "one", check=False)
        assert done.returncode == 2 and f"bash {script.name}" in done.stderr and done.stderr.endswith(end)

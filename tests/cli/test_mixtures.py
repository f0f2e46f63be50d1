"""Mixture-of-Depths and Mixture-of-Recursions through the stock commands."""

import re

import pytest
import torch
from cli.helpers import USER_DIR, run, tiny_translation_data

pytestmark = pytest.mark.slow

COMMON = f"--user-dir {USER_DIR} --cpu --num-workers 0 --seed 1".split()
TRAINING = ("--optimizer adam --lr 3e-3 --clip-norm 1 --max-update 40 --log-format simple --dropout 0").split()


def sizes(*sides):
    return [
        word
        for side in sides
        for word in f"--{side}-embed-dim 32 --{side}-ffn-embed-dim 64 --{side}-attention-heads 2".split()
    ]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A text in which every word is followed by the next one of the alphabet."""
    folder, letters = tmp_path_factory.mktemp("text"), "abcdefghijklmnopqrstuvwxyz"
    for split, first in (("train", 0), ("valid", 3)):
        lines = (" ".join(letters[(first + row + i) % 26] for i in range(20)) for row in range(100))
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n")
    run(
        "fairseq-preprocess",
        "--only-source",
        "--trainpref",
        folder / "train.txt",
        "--validpref",
        folder / "valid.txt",
        "--destdir",
        folder / "bin",
    )
    return folder / "bin"


@pytest.mark.parametrize(
    "arch, flags",
    (
        ("mixture_of_recursions_lm_tiny", ["--router-args", '{"warmup": 20}']),
        ("mixture_of_recursions_lm_tiny", ["--router", "token_choice", "--router-args", '{"balance": "bias"}']),
        ("mixture_of_depths_lm_tiny", []),
    ),
    ids=("expert", "token", "depths"),
)
def test_language_model(text, tmp_path, arch, flags):
    task = "--task language_modeling --tokens-per-sample 32".split()
    log = run(
        "fairseq-train",
        text,
        *COMMON,
        *task,
        "--arch",
        arch,
        *sizes("decoder"),
        "--decoder-input-dim",
        "32",
        "--decoder-output-dim",
        "32",
        *TRAINING,
        "--criterion",
        "cross_entropy",
        "--max-tokens",
        "512",
        *flags,
        "--save-dir",
        tmp_path,
    )
    log = log.stdout + log.stderr
    first, valid = (
        float(re.findall(pattern, log)[place])
        for pattern, place in ((r"epoch 001 \| loss ([\d.]+)", 0), (r"valid on 'valid' subset \| loss ([\d.]+)", -1))
    )
    assert valid < first
    path = ("--path", tmp_path / "checkpoint_last.pt")
    again = run("fairseq-validate", text, *COMMON, *task, *path, "--max-tokens", "100", "--criterion", "cross_entropy")
    found = float(re.findall(r"\| loss ([\d.]+)", again.stdout + again.stderr)[-1])
    assert found == pytest.approx(valid, abs=2e-3)  # also in batches of another size
    done = run("fairseq-eval-lm", text, *COMMON, *task, *path, "--gen-subset", "valid", "--max-tokens", "512")
    found = float(re.search(r"Loss \(base 2\): ([\d.]+)", done.stdout + done.stderr)[1])
    assert found == pytest.approx(valid, abs=2e-3)


def test_translation(tmp_path):
    data = tiny_translation_data(tmp_path / "data", n_words=12)
    task = "--task translation -s src -t tgt".split()
    log = run(
        "fairseq-train",
        data,
        *COMMON,
        *task,
        "--arch",
        "mixture_of_recursions_tiny",
        "--share-all-embeddings",
        *sizes("encoder", "decoder"),
        *TRAINING,
        "--criterion",
        "label_smoothed_cross_entropy",
        "--max-tokens",
        "400",
        "--save-dir",
        tmp_path / "save",
    )
    valid = float(re.findall(r"valid on 'valid' subset \| loss ([\d.]+)", log.stdout + log.stderr)[-1])
    path = ("--path", tmp_path / "save" / "checkpoint_last.pt")
    state = torch.load(path[1], weights_only=True)["model"]
    assert sum("router.unit" in name for name in state) == 6
    again = run(
        "fairseq-validate",
        data,
        *COMMON,
        *task,
        *path,
        "--batch-size",
        "7",
        "--criterion",
        "label_smoothed_cross_entropy",
    )
    found = float(re.findall(r"\| loss ([\d.]+)", again.stdout + again.stderr)[-1])
    assert found == pytest.approx(valid, abs=2e-3)
    hypotheses = []
    for size in (1, 20):  # alone, and in a batch
        done = run("fairseq-generate", data, *COMMON, *path, "--beam", "3", "--batch-size", str(size))
        hypotheses.append(sorted(re.findall(r"^H-\d+\t.*", done.stdout, re.M)))
    assert len(hypotheses[0]) == 20
    for one, other in zip(*hypotheses):
        number, score, words = one.split("\t")
        assert (number, words) == (other.split("\t")[0], other.split("\t")[2])
        assert float(score) == pytest.approx(float(other.split("\t")[1]), abs=1e-4)

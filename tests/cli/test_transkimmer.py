"""Transkimmer through the stock commands: sentence classification with a target, and validated."""

import random
import re

import pytest
from cli.helpers import USER_DIR, run

MODEL = (
    "--arch transkimmer_base --encoder-layers 2 --encoder-embed-dim 16 --encoder-ffn-embed-dim 32 "
    "--encoder-attention-heads 2 --dropout 0.0 --attention-dropout 0.0"
).split()
TASK = "--task sentence_prediction --num-classes 2 --max-positions 32 --init-token 0".split()
TRAIN = (
    "--optimizer adam --lr 3e-3 --batch-size 32 --max-update 40 --log-format simple --cpu --num-workers 0 "
    "--seed 1 --required-batch-size-multiple 1"
).split()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A sentence is good or bad by one of its words."""
    folder, rng = tmp_path_factory.mktemp("sentences"), random.Random(1)
    for split, size in (("train", 320), ("valid", 64)):
        lines, labels = [], []
        for _ in range(size):
            words = [f"w{rng.randrange(20)}" for _ in range(rng.randint(3, 12))]
            labels.append(rng.choice(("good", "bad")))
            words[rng.randrange(len(words))] = labels[-1]
            lines.append(" ".join(words))
        (folder / f"{split}.input0").write_text("\n".join(lines) + "\n")
        (folder / f"{split}.label").write_text("\n".join(labels) + "\n")
    for part in ("input0", "label"):
        prefixes = [flag for split in ("train", "valid") for flag in (f"--{split}pref", folder / f"{split}.{part}")]
        run("fairseq-preprocess", "--only-source", *prefixes, "--destdir", folder / "bin" / part)
    return folder / "bin"


def test_trains_and_validates(data, tmp_path):
    flags = ["--user-dir", USER_DIR, *TASK]
    loss = "--criterion skim_loss --target-flops 0.8".split()
    best = "--best-checkpoint-metric accuracy_on_target --maximize-best-checkpoint-metric".split()
    log = run("fairseq-train", data, *flags, *MODEL, *TRAIN, *loss, *best, "--save-dir", tmp_path)
    text = log.stdout + log.stderr
    valid = re.findall(r"valid on 'valid' subset .*", text)[-1]
    for name in (
        "accuracy",
        "kept ",
        "kept_1",
        "kept_2",
        "flops ",
        "flops_speedup",
        "skim_factor",
        "accuracy_on_target",
    ):
        assert f"| {name}" in valid
    share = float(re.search(r"flops ([\d.]+)", valid)[1])
    assert share < 1  # from 1.2 within 40 updates
    assert ("--target-flops 0.8 was missed" in text) == (abs(share / 0.8 - 1) > 0.03)
    done = run(
        "fairseq-validate",
        data,
        "--user-dir",
        USER_DIR,
        *TASK,
        "--path",
        tmp_path / "checkpoint_last.pt",
        *loss,
        "--cpu",
        "--batch-size",
        "7",
        "--num-workers",
        "0",
    )
    again = done.stdout + done.stderr
    for name in ("accuracy", "kept", "flops"):  # also in batches of another size
        expected, found = (re.findall(rf"\| {name} ([\d.]+)", each)[-1] for each in (valid, again))
        assert float(found) == pytest.approx(float(expected), abs=2e-3)

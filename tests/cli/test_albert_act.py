"""ALBERT-ACT through the stock commands: masked language modelling with the price of depth, resumed."""

import re
import sys
from pathlib import Path

import pytest
import torch
from cli.helpers import USER_DIR, run

TRAIN = (
    "--task masked_lm --user-dir {} --arch albert_act_tiny --encoder-embed-dim 32 --encoder-ffn-embed-dim 64 "
    "--encoder-attention-heads 2 --encoder-input-dim 16 --criterion ponder_loss --task-criterion masked_lm "
    "--target-depth 2.5 --optimizer adam --lr 5e-3 --tokens-per-sample 24 --sample-break-mode eos --batch-size 16 "
    "--cpu --num-workers 0 --seed 1 --log-format simple --save-interval-updates 5 --no-epoch-checkpoints"
).format(USER_DIR)
SOP = TRAIN.replace("masked_lm ", "masked_lm_sop ").replace("--sample-break-mode eos ", "")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    letters = "abcdefghijklmnopqrstuvwxyz"
    for split, first in (("train", 0), ("valid", 3)):
        lines = (" ".join(letters[(first + row + i) % 26] for i in range(10 + row % 7)) for row in range(64))
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n")
    prefixes = [flag for split in ("train", "valid") for flag in (f"--{split}pref", folder / f"{split}.txt")]
    run("fairseq-preprocess", "--only-source", *prefixes, "--destdir", folder / "bin")
    return folder / "bin"


def test_two_workers_train_as_one_does(data, tmp_path):
    """With twice the batches an update; the controller sees the depth of both."""
    flags = [*SOP.split(), "--batch-size", "4", "--max-update", "4", "--disable-validation"]
    run("fairseq-train", data, *flags, "--update-freq", 2, "--save-dir", tmp_path / "one")
    run(
        "torchrun",
        "--nproc-per-node",
        2,
        Path(sys.executable).parent / "fairseq-train",
        data,
        *flags,
        "--save-dir",
        tmp_path / "two",
    )
    one, two = (torch.load(tmp_path / name / "checkpoint_last.pt", weights_only=False) for name in ("one", "two"))
    assert one["task_state"]["ponder"]["sum"] != 0
    assert two["task_state"]["ponder"] == pytest.approx(one["task_state"]["ponder"], abs=1e-6)
    for name, tensor in one["model"].items():
        torch.testing.assert_close(two["model"][name], tensor, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    "train, message",
    (
        (TRAIN, "error: 64 of 64 samples are longer than 8 tokens"),  # fairseq's own task would leave them out
        (SOP, "error: --max-positions 8 is less than --tokens-per-sample 24: "),
    ),
    ids=("masked_lm", "masked_lm_sop"),
)
def test_one_error_for_texts_that_are_too_long(data, tmp_path, train, message):
    flags = [*train.split(), "--max-positions", "8", "--save-dir", tmp_path / "none"]
    done = run("fairseq-train", data, *flags, check=False)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(message)
    assert "Traceback" not in done.stderr


def test_trains_logs_depth_and_resumes_exactly(data, tmp_path):
    done = run("fairseq-train", data, *TRAIN.split(), "--max-update", 10, "--save-dir", tmp_path / "whole")
    log = done.stderr + done.stdout
    valid = re.findall(r"valid on 'valid' subset \|(.*)", log)[-1]
    values = {name: float(value) for name, value in re.findall(r"(\w+) ([\d.]+)", valid)}
    shares = [values[f"depth_{depth}"] for depth in range(1, 7)]
    assert sum(shares) == pytest.approx(1, abs=1e-3)
    assert sum(depth * share for depth, share in enumerate(shares, 1)) == pytest.approx(values["depth"], abs=5e-3)
    assert values["at_limit"] <= shares[-1] and values["loss"] > 0 and 0 <= values["remainder"] <= 1

    (tmp_path / "half").mkdir()
    checkpoint = next((tmp_path / "whole").glob("checkpoint_*_5.pt"))
    checkpoint.rename(tmp_path / "half" / "checkpoint_last.pt")
    run("fairseq-train", data, *TRAIN.split(), "--max-update", 10, "--save-dir", tmp_path / "half")
    whole, half = (torch.load(tmp_path / name / "checkpoint_last.pt", weights_only=False) for name in ("whole", "half"))
    assert whole["task_state"]["ponder"]["sum"] != 0
    assert whole["task_state"] == half["task_state"]
    for name, tensor in whole["model"].items():
        assert torch.equal(tensor, half["model"][name]), name

"""fairseq-train with the prices of two policies and two targets: two workers are one; a resumed training goes on."""

import json
import sys
from pathlib import Path

import pytest
import torch

from cli.helpers import TINY_TRANSFORMER, USER_DIR, run, tiny_translation_data

pytestmark = pytest.mark.slow
SIZES = [*TINY_TRANSFORMER, "--encoder-layers", "3", "--decoder-layers", "3"]
TARGETS = [
    "--target-depth",
    "1.5",
    "--target-flops",
    "0.6",
    "--target-args",
    '{"depth": {"rate": 0.1}, "flops": {"rate": 0.1}}',
]


def train(data, save_dir, epochs, *more, workers=1):
    # without dropout and noise nothing random depends on the number of workers
    flags = [
        data,
        "--user-dir",
        USER_DIR,
        "--arch",
        "shared_transformer",
        *SIZES,
        "--dropout",
        "0",
        "--encoder-router",
        "skimming",
        "--encoder-router-args",
        '{"noise": 0, "bias": 1}',
        "--decoder-halting",
        "act",
        "--criterion",
        "adaptive_compute_loss",
        "--task-criterion",
        "label_smoothed_cross_entropy",
        *TARGETS,
        "--optimizer",
        "adam",
        "--lr",
        "0.005",
        "--batch-size",
        "8",
        "--max-epoch",
        epochs,
        "--save-dir",
        save_dir,
        "--cpu",
        "--num-workers",
        "0",
        "--log-format",
        "json",
        *more,
    ]
    if workers == 1:
        done = run("fairseq-train", *flags)
    else:
        done = run("torchrun", "--nproc-per-node", workers, Path(sys.executable).parent / "fairseq-train", *flags)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "| INFO | train | {" in line]
    return [json.loads(line.split(" | ")[-1]) for line in lines]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two epochs: by one worker with --update-freq 2; and by two workers, the second epoch resumed from the first."""
    folder = tmp_path_factory.mktemp("adaptive")
    data = tiny_translation_data(folder / "data", n_train=96, n_valid=16)
    one = train(data, folder / "one", 2, "--update-freq", "2")
    first = train(data, folder / "first", 2, workers=2)[:1]
    two = first + train(data, folder / "two", 2, "--restore-file", folder / "first" / "checkpoint1.pt", workers=2)
    states = [torch.load(folder / name / "checkpoint_last.pt", weights_only=True) for name in ("one", "two")]
    return one, two, states


def test_two_workers_train_as_one(trained):
    one, two, states = trained
    assert [record["train_num_updates"] for record in two] == ["6", "12"]
    for name in ("loss", "act_depth", "act_price", "act_weight", "skimming_kept", "skimming_flops", "skimming_weight"):
        pairs = [(float(a[f"train_{name}"]), float(b[f"train_{name}"])) for a, b in zip(one, two)]
        assert all(a == pytest.approx(b, abs=2e-4) for a, b in pairs), (name, pairs)
    assert float(one[1]["train_act_weight"]) != 0 != float(one[1]["train_skimming_weight"])
    for name, weight in states[0]["model"].items():
        torch.testing.assert_close(states[1]["model"][name], weight, rtol=1e-3, atol=1e-4, msg=name)


def test_controllers_keep_their_states(trained):
    first, second = (state["task_state"] for state in trained[2])
    for name in ("ponder", "skimming"):
        assert first[name]["update"] == 11 and first[name]["sum"]
        numbers = [[*state[name].pop("evaluated"), *state[name].values()] for state in (first, second)]
        assert numbers[1] == pytest.approx(numbers[0], rel=1e-4) and list(first[name]) == list(second[name])
    assert first["skimming"]["moves"] != 0  # a threshold moves before the first batch of an update, never within it
    assert first["ponder"]["excess"] != first["skimming"]["excess"]

"""``fairseq-train --eval-bleu``: its checkpoints, new and of before NumPy's arrays were made plain, serve every command."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from cli.helpers import TINY_TRANSFORMER, USER_DIR, run, tiny_translation_data
from fairseq import checkpoint_utils

import fairseq_adaptive.plugin  # noqa: F401  applies the patches

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_translation_data(tmp_path_factory.mktemp("data"), n_train=40)


def train(data, save_dir, updates):
    return run(
        "fairseq-train",
        data,
        "--user-dir",
        USER_DIR,
        "--arch",
        "transformer",
        *TINY_TRANSFORMER,
        "--optimizer",
        "adam",
        "--lr",
        "0.001",
        "--batch-size",
        "20",
        "--cpu",
        "--num-workers",
        "0",
        "--save-dir",
        save_dir,
        "--max-update",
        updates,
        "--eval-bleu",
        "--eval-bleu-args",
        '{"beam": 2, "max_len_a": 0, "max_len_b": 9}',
        "--best-checkpoint-metric",
        "bleu",
        "--maximize-best-checkpoint-metric",
        "--log-format",
        "simple",
    )


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    save_dir = tmp_path_factory.mktemp("trained")
    train(data, save_dir, 4)
    return save_dir


def sums(path):
    """What BLEU is computed from."""
    state = checkpoint_utils.load_checkpoint_to_cpu(str(path))
    found = {name: meter["sum"] for _, name, _, meter in state["extra_state"]["metrics"]["valid"] if "_bleu" in name}
    assert type(found["_bleu_counts"]) is type(found["_bleu_totals"]) is np.ndarray
    return found


@pytest.mark.parametrize("kind", ["new", "old"])
def test_every_command_reads_it(kind, data, trained, tmp_path):
    save_dir = tmp_path / "run"
    shutil.copytree(trained, save_dir)
    if kind == "old":
        for path in save_dir.glob("*.pt"):
            state = torch.load(path, weights_only=True)
            checkpoint = checkpoint_utils.load_checkpoint_to_cpu(str(path))
            torch.save({**state, "extra_state": checkpoint["extra_state"]}, path)
            with pytest.raises(Exception, match=r"numpy\._?core\.multiarray\._reconstruct"):
                torch.load(path, weights_only=True)
    last = save_dir / "checkpoint_last.pt"
    before = sums(last)

    done = run("fairseq-generate", data, "--user-dir", USER_DIR, "--path", last, "--cpu", "--beam", "2")
    assert sum(line.startswith("H-") for line in done.stdout.splitlines()) == 20
    for script, *flags in (
        ("average_checkpoints.py", "--inputs", last),
        ("export_checkpoint.py", last, "--to", "fairseq"),
    ):
        output = tmp_path / f"{script}.pt"
        run("python", SCRIPTS / script, *flags, "--output", output)
        plain = torch.load(output, weights_only=True)
        assert torch.equal(
            plain["model"]["encoder.layers.0.fc1.weight"],
            torch.load(last, weights_only=False)["model"]["encoder.layers.0.fc1.weight"],
        )

    done = train(data, save_dir, 6)
    assert "Loaded checkpoint" in done.stdout + done.stderr and "@ 4 updates" in done.stdout + done.stderr
    torch.load(last, weights_only=True)
    after = sums(last)
    # each validation adds the same sentences to what was there before
    assert after["_bleu_ref_len"] > before["_bleu_ref_len"]
    assert (after["_bleu_totals"] > before["_bleu_totals"]).all() and after["_bleu_totals"].dtype == np.int64

"""When a training ends, also after it was stopped and run again, or was the second one of its process."""

import shutil

import families
import pytest
import torch
from fairseq import checkpoint_utils, options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq_cli import train

OURS = "--arch shared_transformer_lm --decoder-layers 2 --decoder-unique-layers 1"
STOCK = "--arch transformer_lm --decoder-layers 1"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = families.write_data(tmp_path_factory.mktemp("data")) / "text"
    for ending in "bin", "idx":
        shutil.copy(folder / f"train.{ending}", folder / f"valid.{ending}")
    return folder


@pytest.fixture
def validations(monkeypatch):
    """Losses that validations find, to be set; and how often one asked for them."""
    losses = []

    def validate(cfg, trainer, task, epoch_itr, subsets):
        return [losses.pop(0)]

    monkeypatch.setattr(train, "validate", validate)
    return losses


@pytest.fixture
def run(data, caplog):
    def run(folder, *flags, arch=OURS):
        """What was logged by a training of some updates an epoch and one validation after each epoch."""
        command = (
            f"{data} --task language_modeling {arch} --decoder-embed-dim 16 --decoder-ffn-embed-dim 16 "
            "--decoder-attention-heads 2 --tokens-per-sample 24 --batch-size 100 --criterion cross_entropy --optimizer "
            "adam --lr 0.001 --cpu --log-format none --num-workers 0 --no-epoch-checkpoints "
            f"--save-dir {folder}"
        )
        args = options.parse_args_and_arch(options.get_training_parser(), [*command.split(), *flags])
        caplog.clear()
        with caplog.at_level("INFO"):
            train.main(convert_namespace_to_omegaconf(args))
        return caplog.text

    return run


def files(folder):
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.glob("*.pt")}


def updates_of(folder):
    state = torch.load(folder / "checkpoint_last.pt", weights_only=True)
    return state["optimizer_history"][-1]["num_updates"]


@pytest.mark.parametrize(
    "arch,flags,losses",
    [
        (OURS, ("--max-update", "3"), [2.0]),
        (STOCK, ("--max-update", "3"), [2.0]),
        (OURS, ("--max-epoch", "1"), [2.0]),
        (OURS, ("--stop-time-hours", "1e-9"), [2.0]),
        (STOCK, ("--patience", "2"), [2.0, 3.0, 2.5]),
    ],
    ids=lambda value: value[0][2:] if isinstance(value, tuple) else "",
)
def test_what_has_ended_ends_again(arch, flags, losses, run, validations, tmp_path):
    validations[:] = losses
    assert "finished:" not in run(tmp_path, *flags, arch=arch) and not validations
    before, updates = files(tmp_path), updates_of(tmp_path)
    said = run(tmp_path, *flags, arch=arch)
    assert f"finished: this training has ended after {updates} updates, " in said
    assert f"{flags[0]} {float(flags[1]) if 'hours' in flags[0] else flags[1]} says" in said
    assert "begin training epoch" not in said and files(tmp_path) == before
    more = {"--max-update": "4", "--max-epoch": "2", "--stop-time-hours": "0", "--patience": "3"}[flags[0]]
    validations[:] = [1.5, 1.0, 0.5]
    said = run(tmp_path, flags[0], more, *("--max-update", str(updates + 1)), arch=arch)
    assert "finished:" not in said and updates_of(tmp_path) == updates + 1


def test_patience_counts_on_after_a_resume(run, validations, tmp_path):
    """One training of five validations, and the same one in pieces."""
    losses = [3.0, 2.0, 2.5, 1.9, 2.2, 2.1, 1.95, 1.0]
    validations[:] = losses
    run(tmp_path / "whole", "--patience", "3")
    assert validations == [1.0]
    validations[:] = losses
    for epoch in range(1, 7):
        run(tmp_path / "pieces", "--patience", "3", "--max-epoch", str(epoch))
        assert len(validations) == len(losses) - epoch
    said = run(tmp_path / "pieces", "--patience", "3")
    assert "early stop since valid performance" in said and validations == [1.0]
    validations[:] = [1.0, 1.1]
    run(tmp_path / "pieces", "--patience", "3", "--reset-meters", "--max-epoch", "9")  # counts from nothing
    assert not validations


def test_patience_goes_on_from_the_best_score_of_older_checkpoints(run, validations, tmp_path):
    validations[:] = [2.0]
    run(tmp_path, "--patience", "1", "--max-epoch", "1")
    path = str(tmp_path / "checkpoint_last.pt")
    state = checkpoint_utils.load_checkpoint_to_cpu(path)
    del state["extra_state"]["early_stop"]
    state["cfg"] = None
    checkpoint_utils.torch_persistent_save(state, path)
    validations[:] = [2.5, 1.0]
    assert "early stop" in run(tmp_path, "--patience", "1") and validations == [1.0]


def test_a_second_training_of_one_process_begins_anew(run, validations, tmp_path):
    validations[:] = [1.0, 2.0, 2.0, 1.9]
    run(tmp_path / "first", "--patience", "2", "--max-epoch", "2")
    run(tmp_path / "second", "--patience", "1", "--max-epoch", "2")
    assert not validations
    best = checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "second/checkpoint_best.pt"))
    assert best["extra_state"]["best"] == best["extra_state"]["val_loss"] == 1.9


def test_time_of_another_training_does_not_count(run, validations, tmp_path):
    validations[:] = [2.0, 1.0, 1.0]
    run(tmp_path / "first", "--max-update", "1")
    path = str(tmp_path / "first/checkpoint_last.pt")
    state = checkpoint_utils.load_checkpoint_to_cpu(path)
    state["extra_state"]["previous_training_time"] = 36000.0
    state["cfg"] = None
    checkpoint_utils.torch_persistent_save(state, path)
    flags = "--max-update", "3", "--stop-time-hours", "1"
    run(tmp_path / "tuned", *flags, "--finetune-from-model", path)
    assert updates_of(tmp_path / "tuned") == 3
    assert "finished: this training has ended after 1 updates, after 10.00 hours, as --stop" in run(
        tmp_path / "first", *flags
    )


def test_a_link_to_a_checkpoint_is_followed(run, validations, tmp_path):
    validations[:] = [2.0, 1.0]
    run(tmp_path / "first", "--max-update", "1")
    (tmp_path / "second").mkdir()
    (tmp_path / "second/checkpoint_last.pt").symlink_to(tmp_path / "first/checkpoint_last.pt")
    before = files(tmp_path / "first")
    assert "epoch 1 @ 2 updates" in run(tmp_path / "second", "--max-update", "2")
    assert not (tmp_path / "second/checkpoint_last.pt").is_symlink() and files(tmp_path / "first") == before

"""A training that is killed at any moment and run again ends as one that was not, bit for bit, and then has ended."""

import random
import shutil
import signal

import families
import pytest
import torch
from compat.forks import Forks
from compat.same import differences
from families import FAMILIES
from pairwise import all_cases

UPDATES = 6
QUICK = "transkimmer"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = families.write_data(tmp_path_factory.mktemp("data"))
    for path in list(folder.rglob("train*")):
        shutil.copy(path, path.with_name(path.name.replace("train", "valid", 1)))
    return folder


@pytest.fixture(scope="module")
def forks():
    with Forks() as forks:
        yield forks


def flags(name, data, folder):
    """An epoch has 3 to 5 updates; a checkpoint every second one, and old ones are removed."""
    family = FAMILIES[name]
    return [
        *([str(data / family.data)] if family.data else []),
        *families._COMMON.split(),
        *family.flags.split(),
        *"--batch-size 160 --dropout 0.1 --save-interval-updates 2 --keep-interval-updates 1".split(),
        *"--keep-last-epochs 1 --max-valid-steps 2 --patience 9 --cpu --log-format none".split(),
        *("--max-update", str(UPDATES), "--save-dir", str(folder)),
    ]


def what_counts(path):
    state = torch.load(path, weights_only=True)
    extra = {key: state["extra_state"].get(key) for key in ("train_iterator", "val_loss", "best", "early_stop")}
    state["optimizer_history"] = state["optimizer_history"][-1]  # it has an entry for every start
    kept = "model", "criterion", "optimizer_history", "last_optimizer_state", "task_state"
    for name in [name for name in state["model"] if name.endswith("_float_tensor")]:
        del state["model"][name]  # fairseq's: it has a type and a device, and no value
    return {**{key: state[key] for key in kept}, "extra_state": extra}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == QUICK else pytest.mark.slow) for name in FAMILIES]
)
def test_killed_trainings_end_as_others(name, data, forks, tmp_path):
    status, log, moments = forks.train(flags(name, data, tmp_path / "whole"), tmp_path / "log")
    assert status == 0, log
    kill_at = random.Random(name).randrange(moments)
    status, log, _ = forks.train(flags(name, data, tmp_path / "killed"), tmp_path / "log", kill_at)
    assert status == -signal.SIGKILL, log
    status, log, _ = forks.train(flags(name, data, tmp_path / "killed"), tmp_path / "log")
    assert status == 0, log
    whole, killed = (tmp_path / folder / "checkpoint_last.pt" for folder in ("whole", "killed"))
    assert differences(what_counts(killed), what_counts(whole), name) == []

    if name != QUICK and not all_cases():  # that it has ended, test_endings.py asks of other families
        return
    left = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in whole.parent.glob("*.pt")}
    status, log, _ = forks.train(flags(name, data, tmp_path / "whole"), tmp_path / "log")
    assert status == 0 and f"finished: this training has ended after {UPDATES} updates, as --max-update" in log
    assert left == {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in whole.parent.glob("*.pt")}

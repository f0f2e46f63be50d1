"""A training that is killed at any moment and run again ends as one that was not, bit for bit, and then has ended."""

import random
import shutil

import families
import pytest
import torch
from compat.forks import Forks
from compat.same import differences
from families import FAMILIES

KILLS = 2  # in a row
QUICK = "shared_transformer_lm", "transkimmer"


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
    """7 updates, an epoch has 3 to 5; a checkpoint every second one, and old ones are removed."""
    family = FAMILIES[name]
    return [
        *([str(data / family.data)] if family.data else []),
        *families._COMMON.split(),
        *family.flags.split(),
        *"--batch-size 160 --dropout 0.1 --max-update 7 --save-interval-updates 2 --keep-interval-updates 1".split(),
        *"--keep-last-epochs 1 --max-valid-steps 2 --patience 9 --cpu --log-format none".split(),
        "--save-dir",
        str(folder),
    ]


def what_counts(path):
    state = torch.load(path, weights_only=True)
    extra = {key: state["extra_state"].get(key) for key in ("train_iterator", "val_loss", "best", "early_stop")}
    kept = "model", "criterion", "optimizer_history", "last_optimizer_state", "task_state"
    return {**{key: state[key] for key in kept}, "extra_state": extra}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in FAMILIES])
def test_killed_trainings_end_as_others(name, data, forks, tmp_path):
    status, log, moments = forks.train(flags(name, data, tmp_path / "whole"), tmp_path / "log")
    assert status == 0, log
    rng = random.Random(name)
    for attempt in range(KILLS):
        kill_at = rng.randrange(moments // (attempt + 1))
        status, log, _ = forks.train(flags(name, data, tmp_path / "killed"), tmp_path / "log", kill_at)
        assert status == -9, log
    status, log, _ = forks.train(flags(name, data, tmp_path / "killed"), tmp_path / "log")
    assert status == 0, log
    whole, killed = (tmp_path / folder / "checkpoint_last.pt" for folder in ("whole", "killed"))
    assert differences(what_counts(killed), what_counts(whole), name) == []

    left = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in whole.parent.iterdir()}
    status, log, _ = forks.train(flags(name, data, tmp_path / "whole"), tmp_path / "log")
    assert status == 0 and "finished: this training has ended after 7 updates, as --max-update 7 says" in log
    assert left == {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in whole.parent.iterdir()}

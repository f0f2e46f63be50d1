"""One training at a time in a --save-dir; what is killed holds nothing."""

import gc
import os
import signal
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
from fairseq import checkpoint_utils
from fairseq.dataclass.configs import FairseqConfig
from fairseq.distributed import utils as distributed_utils
from omegaconf import OmegaConf

from fairseq_adaptive.compat import locks
from fairseq_adaptive.errors import UsageError

# loads locks.py alone: a process that has fairseq takes seconds to begin
OTHER = textwrap.dedent("""
    import importlib.util, os, sys, time
    spec = importlib.util.spec_from_file_location("locks", sys.argv[1])
    locks = importlib.util.module_from_spec(spec)
    sys.modules["fairseq_adaptive"] = type(sys)("fairseq_adaptive")
    sys.modules["fairseq_adaptive.errors"] = errors = type(sys)("errors")
    errors.UsageError = ValueError
    spec.loader.exec_module(locks)
    locks.acquire(sys.argv[2])
    os.register_at_fork(after_in_child=locks._let_go)
    reader = os.fork()  # as a worker that reads data, which ends later than a training that is killed
    if not reader:  # it says so once it has let go
        print(os.getpid(), flush=True)
    time.sleep(100)
""")


@pytest.fixture
def other(tmp_path):
    """Another process that has locked ``tmp_path``."""
    process = subprocess.Popen(
        [sys.executable, "-c", OTHER, locks.__file__, tmp_path], stdout=subprocess.PIPE, text=True
    )
    reader = int(process.stdout.readline())
    yield process
    process.kill()
    os.kill(reader, signal.SIGKILL)
    process.wait()
    process.stdout.close()


@pytest.fixture(autouse=True)
def end():
    yield
    for path in list(locks._held):
        locks.release(path)


class Trainer(SimpleNamespace):
    """What is asked before a checkpoint is read: the stock function ends at the file that is not there."""

    def __init__(self, rank=0):
        super().__init__(
            cfg=SimpleNamespace(distributed_training=SimpleNamespace(distributed_rank=rank)), checkpoint_suffix=""
        )


def begin(folder, trainer, no_save=False):
    cfg = SimpleNamespace(save_dir=str(folder), no_save=no_save, restore_file="none.pt", finetune_from_model=None)
    with pytest.raises(UsageError) as error:
        checkpoint_utils.load_checkpoint(cfg, trainer)
    return str(error.value)


NEXT = "--restore-file none.pt does not exist"  # what is looked at after the lock


def test_the_second_training_is_refused_while_the_first_lives(other, tmp_path):
    link = tmp_path.parent / f"{tmp_path.name}-link"
    link.symlink_to(tmp_path)
    for folder in tmp_path, link:
        said = begin(folder, Trainer())
        assert f"--save-dir {folder} is in use by another training (process {other.pid} on " in said
    assert begin(tmp_path, Trainer(), no_save=True) == NEXT
    assert begin(tmp_path, Trainer(rank=1)) == NEXT  # the first worker is asked
    other.kill()
    other.wait()
    assert begin(tmp_path, Trainer()) == NEXT
    assert (tmp_path / locks.NAME).read_text().startswith(f"process {os.getpid()} on ")


def test_the_lock_ends_with_its_training(tmp_path):
    trainer = Trainer()
    for _ in range(2):  # one process trains as often as it will
        assert begin(tmp_path, trainer) == NEXT
    assert [path.name for path in tmp_path.iterdir()] == [locks.NAME]
    del trainer
    gc.collect()
    assert not list(tmp_path.iterdir()) and not locks._held

    def main(cfg):
        locks.acquire(tmp_path)
        raise KeyboardInterrupt

    cfg = OmegaConf.structured(FairseqConfig)
    cfg.common.cpu = True
    with pytest.raises(KeyboardInterrupt):
        distributed_utils.call_main(cfg, main)
    assert not list(tmp_path.iterdir()) and not locks._held


def test_a_lock_that_another_machine_left_is_told(tmp_path, caplog):
    (tmp_path / locks.NAME).write_text("process 12 on elsewhere since 2026-01-01 00:00:00\n")
    assert begin(tmp_path, Trainer()) == NEXT
    assert "(process 12 on elsewhere since 2026-01-01 00:00:00) did not end by itself" in caplog.text


def test_without_locks_the_process_is_looked_for(other, tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "_try_lock", lambda lock: None)
    assert f"is in use by another training (process {other.pid} on " in begin(tmp_path, Trainer())
    other.kill()
    other.wait()
    assert begin(tmp_path, Trainer()) == NEXT


def test_a_lock_whose_file_was_removed_is_taken_again(tmp_path, monkeypatch):
    path, stock, opened = tmp_path / locks.NAME, locks._try_lock, []

    def try_lock(lock):
        opened.append(lock)
        if len(opened) == 1:
            path.unlink()  # whoever had it ends between two calls of ours
        return stock(lock)

    monkeypatch.setattr(locks, "_try_lock", try_lock)
    locks.acquire(tmp_path)
    assert len(opened) == 2 and path.exists()

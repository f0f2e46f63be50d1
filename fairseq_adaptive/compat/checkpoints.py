"""Mends of fairseq's checkpoints: safe to load, whole on the disk, and with all that a training remembers."""

import argparse
import os
import pickle
import re
import time
import traceback

import numpy as np
import torch

from fairseq_adaptive.errors import UsageError


def _raised_in(trace):
    frames = [frame for frame, _ in traceback.walk_tb(trace)]
    return frames[-1].f_globals.get("__name__", "") if frames else ""


def load_safely():
    """fairseq's own checkpoints load, and unpickling one runs no code.

    torch >= 2.6 refuses to unpickle classes that it does not know, ``argparse.Namespace`` among them, which fairseq
    stores. Allowing that one class keeps unpickling safe; what the strings in a file can do is the matter of
    :mod:`.untrusted_flags` and :mod:`.literals`. What is still refused could run code when loaded, so say in one
    line which file and class, instead of torch's advice to load it all the same.
    """
    from fairseq import checkpoint_utils

    torch.serialization.add_safe_globals([argparse.Namespace])
    stock = checkpoint_utils.load_checkpoint_to_cpu

    def load_checkpoint_to_cpu(path, *args, **kwargs):
        try:
            return stock(path, *args, **kwargs)
        except Exception as error:
            refused = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
            if refused:
                raise UsageError(
                    f"checkpoint {path} is refused: it holds {refused[1]}, which is not on the list of what is safe "
                    "to load, and loading it could run any code. If you did not make this file yourself, do not use "
                    "it; otherwise allow the class with torch.serialization.add_safe_globals in your --user-dir"
                ) from None
            if _raised_in(error.__traceback__) not in ("torch.serialization", "torch._weights_only_unpickler"):
                raise
            raise UsageError(
                f"checkpoint {path} cannot be read: it is cut short or no PyTorch file; take another checkpoint"
            ) from error

    checkpoint_utils.load_checkpoint_to_cpu = load_checkpoint_to_cpu


def _remove_partial(path):
    try:
        os.remove(path)
    except FileNotFoundError:
        pass


def _not_saved(path, error):
    return UsageError(
        f"cannot save checkpoint {path}: {error}. Checkpoints that were saved before are whole; make room (or fix "
        "--save-dir) and run the same command again to resume"
    )


def save_atomically():
    """A checkpoint that cannot be written (full disk) leaves those before it whole.

    fairseq writes to a .tmp file and renames it, but a retry goes on behind the bytes of the failed attempt: the file
    that results cannot be read, and replaces a good checkpoint. When all attempts fail, the .tmp stays and keeps the
    disk full.
    """
    from fairseq import checkpoint_utils
    from fairseq.file_io import PathManager

    stock = checkpoint_utils.torch_persistent_save

    def torch_persistent_save(obj, filename, async_write=False):
        if async_write or not PathManager.supports_rename(filename):
            return stock(obj, filename, async_write=async_write)
        partial = f"{filename}.tmp"
        for attempt in range(3):
            if attempt:
                time.sleep(2.5)  # fairseq's own wait: network storage recovers
            try:
                with PathManager.open(partial, "wb") as f:
                    torch.save(obj, f)
                return PathManager.rename(partial, filename)
            except (OSError, RuntimeError) as error:
                _remove_partial(partial)
                # torch's zip writer reports a failed write as a RuntimeError whose cause is the OSError
                failure = error.__context__ if isinstance(error.__context__, OSError) else error
        raise _not_saved(filename, failure) from None

    checkpoint_utils.torch_persistent_save = torch_persistent_save


def save_plain_numbers():
    """A checkpoint whose best score is a NumPy number can be loaded.

    fairseq's ``--report-mcc``, ``--report-acc-and-f1`` and ``--report-pearson-and-spearman`` give such numbers. With one
    of them as ``--best-checkpoint-metric`` they end up in the checkpoint, which torch >= 2.6 then refuses to load.
    """
    from fairseq import checkpoint_utils

    stock = checkpoint_utils.torch_persistent_save

    def torch_persistent_save(obj, *args, **kwargs):
        _make_plain(obj)
        return stock(obj, *args, **kwargs)

    checkpoint_utils.torch_persistent_save = torch_persistent_save


def _make_plain(container):
    for key, value in container.items() if isinstance(container, dict) else enumerate(container):
        if isinstance(value, np.generic):
            container[key] = value.item()
        elif isinstance(value, (dict, list)):
            _make_plain(value)


def copy_atomically():
    """checkpoint_last.pt and checkpoint_best.pt are replaced whole or not at all.

    fairseq copies them in place: a full disk or a kill in between leaves a stump where the last good checkpoint was.
    """
    from fairseq.file_io import PathManager

    stock = PathManager.copy

    def copy(src_path, dst_path, overwrite=False):
        if not overwrite or not PathManager.supports_rename(dst_path):
            return stock(src_path, dst_path, overwrite=overwrite)
        partial = f"{dst_path}.tmp"
        try:
            done = stock(src_path, partial, overwrite=True)
            if done:
                PathManager.rename(partial, dst_path)
            return done
        except OSError as error:
            _remove_partial(partial)
            raise _not_saved(dst_path, error) from None

    PathManager.copy = staticmethod(copy)


def gather_before_saving():
    """A task can save what its workers hold, as the memory of a Transformer-XL.

    fairseq asks the task for what to save (``get_checkpoint_dict``) on the one worker that saves. Before that, every
    worker calls ``gather_checkpoint`` of a task that has it.
    """
    from fairseq import checkpoint_utils

    stock = checkpoint_utils.save_checkpoint

    def save_checkpoint(cfg, trainer, *args, **kwargs):
        if hasattr(trainer.task, "gather_checkpoint") and not cfg.no_save:
            trainer.task.gather_checkpoint()
        return stock(cfg, trainer, *args, **kwargs)

    checkpoint_utils.save_checkpoint = save_checkpoint


def resume_task_state():
    """What a task remembers, and a criterion through it, survives a resume.

    fairseq's trainer saves the task's state but does not read it back. Other workers than the first get only
    ``extra_state`` of what was read, so it travels in there.
    """
    from fairseq.trainer import Trainer

    stock_state_dict, stock_load = Trainer.state_dict, Trainer.load_checkpoint

    def state_dict(self):
        state = stock_state_dict(self)
        state["extra_state"]["task_state"] = state["task_state"]
        return state

    def load_checkpoint(self, filename, reset_optimizer=False, *args, **kwargs):
        extra_state = stock_load(self, filename, reset_optimizer, *args, **kwargs)
        if extra_state and extra_state.get("task_state") and not reset_optimizer:
            self.task.load_state_dict(extra_state["task_state"])
        return extra_state

    Trainer.state_dict, Trainer.load_checkpoint = state_dict, load_checkpoint

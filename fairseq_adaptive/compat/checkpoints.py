"""Patches of fairseq's checkpoints: safe to load, and with all that a training remembers."""

import argparse
import pickle
import re
import traceback

import torch

from fairseq_adaptive.compat import damage
from fairseq_adaptive.compat.arrays import SavedArray, numeric_arrays
from fairseq_adaptive.compat.plain import restore_arrays
from fairseq_adaptive.errors import UsageError


def _raised_in(trace):
    frames = [frame for frame, _ in traceback.walk_tb(trace)]
    return frames[-1].f_globals.get("__name__", "") if frames else ""


def load_safely():
    """fairseq's own checkpoints load, and unpickling one runs no code.

    torch >= 2.6 refuses to unpickle classes that it does not know, ``argparse.Namespace`` among them, which fairseq
    stores. Allowing that one class keeps unpickling safe; what the strings in a file can do is the matter of
    :mod:`.untrusted_flags` and :mod:`.literals`. NumPy's numbers and arrays of numbers, which were saved before
    :func:`.saving.save_plain`, are read by code of ours. What is still refused could run code when loaded, so say in one
    line which file and class, instead of torch's advice to load it all the same.

    Before that, the checksums in the file are compared with its bytes (:func:`.damage.damage`).
    """
    from fairseq import checkpoint_utils
    from fairseq.file_io import PathManager

    torch.serialization.add_safe_globals([argparse.Namespace])
    stock = checkpoint_utils.load_checkpoint_to_cpu

    def load_checkpoint_to_cpu(path, *args, **kwargs):
        local = not PathManager.path_requires_pathmanager(path)
        found = damage.damage(path) if local else None
        if found is not None:
            raise UsageError(f"checkpoint {path} cannot be read: {found}; {damage.advice(path)}")
        try:
            with numeric_arrays():
                state = stock(path, *args, **kwargs)
        except PermissionError as error:
            raise UsageError(f"checkpoint {path} cannot be read: {error.strerror}") from None
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
            advice = damage.advice(path) if local else "take another checkpoint"
            raise UsageError(
                f"checkpoint {path} cannot be read: it is cut short or no PyTorch file; {advice}"
            ) from error
        restore_arrays(state, saved_as=SavedArray)
        return state

    checkpoint_utils.load_checkpoint_to_cpu = load_checkpoint_to_cpu


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

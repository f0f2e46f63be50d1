"""Patches of how fairseq writes checkpoints: whole on the disk or not at all, and so that they can be read again."""

import os
import time

import torch

from fairseq_adaptive.compat.plain import make_plain
from fairseq_adaptive.errors import UsageError


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
    """A checkpoint that cannot be written (full disk) or read leaves those before it whole.

    fairseq writes to a .tmp file and renames it, but a retry goes on behind the bytes of the failed attempt: the file
    that results cannot be read, and replaces a good checkpoint. When all attempts fail, the .tmp stays and keeps the
    disk full.

    The first checkpoint that goes to a folder is read before it gets its name: a training whose checkpoints cannot be
    read stops there, not after days. It is the only one that ``--write-checkpoints-asynchronously`` does not apply to.
    """
    from fairseq import checkpoint_utils
    from fairseq.file_io import PathManager

    stock = checkpoint_utils.torch_persistent_save
    read_back = set()

    def torch_persistent_save(obj, filename, async_write=False):
        folder = os.path.dirname(os.path.abspath(filename))
        first = folder not in read_back
        if PathManager.supports_rename(filename) and (first or not async_write):
            partial = f"{filename}.tmp"
            _write(obj, partial, filename)
            if first:
                _read_back(obj, partial, filename)
            PathManager.rename(partial, filename)
        else:
            stock(obj, filename, async_write=async_write and not first)
            if first:
                _read_back(obj, filename, filename)
        read_back.add(folder)

    checkpoint_utils.torch_persistent_save = torch_persistent_save


def _write(obj, partial, filename):
    from fairseq.file_io import PathManager

    for attempt in range(3):
        if attempt:
            time.sleep(2.5)  # fairseq's own wait: network storage recovers
        try:
            with PathManager.open(partial, "wb") as f:
                torch.save(obj, f)
            return
        except (OSError, RuntimeError) as error:
            _remove_partial(partial)
            # torch's zip writer reports a failed write as a RuntimeError whose cause is the OSError
            failure = error.__context__ if isinstance(error.__context__, OSError) else error
    raise _not_saved(filename, failure) from None


def _read_back(obj, path, filename):
    from fairseq import checkpoint_utils

    try:
        with torch.serialization.skip_data():  # weights are neither read nor given memory
            if isinstance(obj, dict) and "optimizer_history" in obj:
                checkpoint_utils.load_checkpoint_to_cpu(path)
            else:
                torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if path != filename:
            _remove_partial(path)
        raise UsageError(
            f"cannot save checkpoint {filename}: the first one of this run was written, but cannot be read again, so "
            f"that the training stops. {error if isinstance(error, UsageError) else repr(error)}"
        ) from error


def save_plain():
    """What is saved can be loaded.

    torch >= 2.6 loads no NumPy type. fairseq's ``--eval-bleu`` logs arrays, which are in each checkpoint from the first
    validation on; ``--report-mcc``, ``--report-acc-and-f1`` and ``--report-pearson-and-spearman`` give NumPy numbers,
    which get there as the best score. Tasks can add anything. Some of fairseq's (``audio_finetuning`` and its like) keep
    a ``Dictionary``, which is as safe to load as what is in it.
    """
    from fairseq import checkpoint_utils
    from fairseq.data import Dictionary

    torch.serialization.add_safe_globals([Dictionary])
    stock = checkpoint_utils.torch_persistent_save

    def torch_persistent_save(obj, filename, *args, **kwargs):
        try:
            plain = make_plain(obj)
        except UsageError as error:
            raise UsageError(f"cannot save checkpoint {filename}: {error}") from None
        return stock(plain, filename, *args, **kwargs)

    checkpoint_utils.torch_persistent_save = torch_persistent_save


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

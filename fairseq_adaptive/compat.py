"""The only place that mends fairseq, torch or NumPy; each mend has its reason and a test that fails without it.

``--user-dir`` is imported while the command line is parsed, before fairseq reads a checkpoint or starts its workers, so
that mends made at import reach all of it (``fairseq-hydra-train`` imports it later: see :func:`_refuse_lone_workers`).
"""

import argparse
import atexit
import contextlib
import os
import pickle
import queue
import re
import threading
import time
import traceback
import types
import weakref

import numpy as np
import torch

from fairseq_adaptive.errors import UsageError

applied = []  # names of the mends that are in force, in order
fairseq_error = None  # why fairseq cannot be imported, where it cannot


def apply() -> bool:
    """Apply every mend that this environment needs; calling it again does nothing.

    Returns:
        whether fairseq can be imported; where it cannot, ``fairseq_error`` holds the exception and nothing is mended
    """
    global fairseq_error
    if applied:
        return True
    try:
        import fairseq  # noqa: F401
    except Exception as error:  # PyPI's fairseq 0.12.2 fails with ValueError on Python 3.11
        fairseq_error = error
        return False
    for mend in (_restore_np_compat, _load_safely, _save_atomically, _copy_atomically, _train_cpu_workers,
                 _refuse_lone_workers, _exchange_objects, _resume_same_batches,
                 _keep_last_batch, _end_reading_ahead, _gather_before_saving):
        if mend() is not False:
            applied.append(mend.__name__.strip("_"))
    return True


def _raised_in(trace):
    frames = [frame for frame, _ in traceback.walk_tb(trace)]
    return frames[-1].f_globals.get("__name__", "") if frames else ""


def _restore_np_compat():
    """np.compat.long, which fairseq's datasets use, is back under NumPy 2.

    ``token_block_dataset.py`` and ``language_pair_dataset.py`` use it; it was ``int``. Without it every
    language-modelling task fails.
    """
    if hasattr(np, "compat"):
        return False
    np.compat = types.SimpleNamespace(long=int)


def _load_safely():
    """fairseq's own checkpoints load, and nothing in a checkpoint can run code.

    torch >= 2.6 refuses to unpickle classes that it does not know, ``argparse.Namespace`` among them, which fairseq
    stores. Allowing that one class keeps loading safe. What is still refused could run code when loaded, so say in one
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


def _save_atomically():
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


def _copy_atomically():
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


def _torchrun_workers():
    if all(key in os.environ for key in ("MASTER_ADDR", "MASTER_PORT", "RANK")):
        return int(os.environ.get("WORLD_SIZE", 1))
    return 1


def _train_cpu_workers():
    """torchrun on a CPU trains one model with several workers (gloo, legacy_ddp).

    fairseq counts its workers by CUDA devices. Under ``torchrun`` on a CPU it takes each process for the only one, and
    all train unrelated copies into one folder; told otherwise, it computes ``rank % 0``. ``pytorch_ddp`` passes
    ``device_ids``, which torch refuses for modules on a CPU; ``legacy_ddp`` does not.
    """
    from fairseq.distributed import utils as distributed_utils

    stock = distributed_utils.call_main

    def call_main(cfg, main, **kwargs):
        training = cfg.distributed_training
        on_cpu = (cfg.common.cpu or not torch.cuda.is_available()) and not cfg.common.tpu
        if on_cpu and _torchrun_workers() > 1 and training.distributed_init_method is None:
            training.distributed_init_method = "env://"
            training.distributed_world_size = _torchrun_workers()
            training.distributed_rank = int(os.environ["RANK"])
            training.distributed_no_spawn = True
            training.device_id = 0
            training.distributed_backend = "gloo"
            if training.ddp_backend in ("c10d", "pytorch_ddp"):
                training.ddp_backend = "legacy_ddp"
        return stock(cfg, main, **kwargs)

    distributed_utils.call_main = call_main


def _refuse_lone_workers():
    """torchrun workers that would train unrelated copies into one folder are refused.

    ``fairseq-hydra-train`` imports ``user_dir`` when training has begun, too late for :func:`_train_cpu_workers`.
    ``is_master`` is asked after that and before anything is written.
    """
    from fairseq.distributed import utils as distributed_utils

    stock = distributed_utils.is_master

    def is_master(training):
        workers = _torchrun_workers()
        if workers > 1 and training.distributed_world_size == 1:
            raise UsageError(
                f"torchrun started {workers} workers, but each would train a copy of its own into the same folder. Use "
                "fairseq-train, or set in distributed_training: distributed_init_method='env://', "
                f"distributed_world_size={workers}, distributed_rank='${{oc.decode:${{oc.env:RANK}}}}', "
                "distributed_no_spawn=true, and on a CPU distributed_backend=gloo, ddp_backend=legacy_ddp"
            )
        return stock(training)

    distributed_utils.is_master = is_master


def _exchange_objects():
    """Several workers can resume, and gather logging outputs on a CPU.

    Workers that resume get the checkpoint from worker 0 through ``torch.load``, which refuses fairseq's own classes in
    it (worker 0 has read the file safely by then). Workers that gather logging outputs ask for a CUDA buffer, also on a
    CPU. torch's own collectives do both.
    """
    import torch.distributed as dist
    from fairseq.distributed import utils as distributed_utils

    stock = distributed_utils.all_gather_list

    def broadcast_object_slow(obj, src_rank, group, dist_device):
        box = [obj]
        dist.broadcast_object_list(box, src=src_rank, group=group, device=dist_device)
        return box[0]

    def all_gather_list(data, group=None, max_size=16384):
        group = distributed_utils.get_global_group() if group is None else group
        if torch.cuda.is_available() or distributed_utils.use_xla():
            return stock(data, group=group, max_size=max_size)
        gathered = [None] * distributed_utils.get_world_size(group)
        dist.all_gather_object(gathered, data, group=group)
        return gathered

    distributed_utils._broadcast_object_slow = broadcast_object_slow
    distributed_utils.all_gather_list = all_gather_list


def _resume_same_batches():
    """A training that resumes in its second epoch or later sees the batches of an uninterrupted one.

    fairseq makes batches once and uses them in every epoch, but draws the order of sentences of equal length from the
    epoch in which it makes them: after a resume, sentences meet in other batches.
    """
    from fairseq.tasks import FairseqTask

    stock = FairseqTask.get_batch_iterator

    def get_batch_iterator(self, dataset, *args, epoch=1, **kwargs):
        reused = self.can_reuse_epoch_itr(dataset) and not (
            kwargs.get("disable_iterator_cache") or kwargs.get("update_epoch_batch_itr")
        )
        if not reused or dataset in self.dataset_to_epoch_iter:
            return stock(self, dataset, *args, epoch=epoch, **kwargs)
        iterator = stock(self, dataset, *args, epoch=1, **kwargs)
        dataset.set_epoch(epoch)
        iterator.epoch = max(epoch, 1)
        return iterator

    FairseqTask.get_batch_iterator = get_batch_iterator


def _keep_last_batch():
    """No sentence is dropped from training, validation or generation.

    fairseq's main branch throws the last batch away, which has the longest sentences, when its size is no multiple of
    ``--required-batch-size-multiple`` (8 by default): the scores of ``fairseq-generate`` are then not those of the test
    set. Of no sentence at all it makes an IndexError.
    """
    from fairseq.data import data_utils

    stock = data_utils.batch_by_size

    def batch_by_size(indices, *args, **kwargs):
        if not isinstance(indices, np.ndarray):
            indices = np.fromiter(indices, dtype=np.int64, count=-1)
        batches = stock(indices, *args, **kwargs) if len(indices) else []
        kept = sum(len(batch) for batch in batches)
        return batches if kept == len(indices) else [*batches, indices[kept:]]

    data_utils.batch_by_size = batch_by_size


def _end_reading_ahead():
    """A command that has done its work ends with status 0.

    fairseq reads batches ahead in a daemon thread. Where a training ends at ``--max-update``, Python tears that thread
    down while it may be inside torch, and the process is aborted: "terminate called without an active exception".
    """
    from fairseq.data import iterators

    readers = weakref.WeakSet()
    leaving = threading.Event()

    class BackgroundConsumer(iterators.BackgroundConsumer):
        def __init__(self, room, source, *args, **kwargs):
            def until_exit():
                for item in source:
                    if leaving.is_set():
                        return
                    yield item

            super().__init__(room, until_exit(), *args, **kwargs)
            readers.add(self)

    @atexit.register
    def end_readers():
        leaving.set()
        for reader in readers:
            with contextlib.suppress(queue.Empty):
                while True:
                    reader._queue.get_nowait()  # a reader waits here for room
            reader.join(timeout=5)

    iterators.BackgroundConsumer = BackgroundConsumer


def _gather_before_saving():
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

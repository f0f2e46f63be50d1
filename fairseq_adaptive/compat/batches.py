"""Patches of fairseq's batches: what is read, in which order, and when reading ends."""

import atexit
import contextlib
import queue
import threading
import types
import weakref

import numpy as np


def restore_np_compat():
    """np.compat.long, which fairseq's datasets use, is back under NumPy 2.

    ``token_block_dataset.py`` and ``language_pair_dataset.py`` use it; it was ``int``. Without it every
    language-modelling task fails.
    """
    if hasattr(np, "compat"):
        return False
    np.compat = types.SimpleNamespace(long=int)


def resume_same_batches():
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


def keep_last_batch():
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


def end_reading_ahead():
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

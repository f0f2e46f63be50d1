"""What a training waits for without a word: other workers, and those that read its data."""

import functools
import logging
import threading
import time

AFTER = 60.0  # seconds
logger = logging.getLogger(__name__)
_waits = {}  # from the thread that waits to [since, text, whether it was noted]
_watcher = None


def note_long_waits():
    """A worker that waits for a minute says for what, once, and when it goes on.

    A worker that was stopped, or whose machine is gone, lets all others wait without end: those of a training in
    their collective calls, one that reads data (``--num-workers``) in the next batch. Collective calls of CUDA devices
    return at once and are the matter of torch's own watchdog.
    """
    import torch
    from fairseq.data import iterators

    if torch.distributed.is_available():
        for name in (
            "all_gather",
            "all_gather_object",
            "all_reduce",
            "all_to_all_single",
            "barrier",
            "broadcast",
            "broadcast_object_list",
            "gather",
            "reduce",
        ):
            setattr(torch.distributed, name, _noted(getattr(torch.distributed, name), _for_workers))
    for kind in iterators.CountingIterator, iterators.BufferedIterator:
        kind.__next__ = _noted(kind.__next__, _for_data)


def _for_workers():
    import torch

    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return (
        f"worker {rank} of {size} waits for the others: one may be stopped (state T in ps; kill -CONT goes on) or busy "
        "with a large checkpoint, or its machine or network be gone"
    )


def _for_data():
    return (
        "the next batch is waited for: a process of --num-workers may be stopped (state T in ps; kill -CONT goes on), or "
        "the file system of the data not answer"
    )


def _noted(function, text):
    @functools.wraps(function)
    def waiting(*args, **kwargs):
        thread = threading.get_ident()
        if thread in _waits:  # one wait within another
            return function(*args, **kwargs)
        wait = _waits[thread] = [time.monotonic(), text, False]
        _watch()
        try:
            return function(*args, **kwargs)
        finally:
            del _waits[thread]
            if wait[2]:
                logger.warning(f"going on after {time.monotonic() - wait[0]:.0f} seconds")

    return waiting


def _watch():
    global _watcher
    if _watcher is None or not _watcher.is_alive():  # no thread outlives a fork
        _watcher = threading.Thread(target=_look, daemon=True)
        _watcher.start()


def _look():
    while True:
        time.sleep(AFTER / 12)
        for wait in list(_waits.values()):
            waited = time.monotonic() - wait[0]
            if waited > AFTER and not wait[2]:
                wait[2] = True
                logger.warning(f"after {waited:.0f} seconds: {wait[1]()}")

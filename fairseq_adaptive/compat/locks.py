"""One training at a time in a ``--save-dir``."""

import contextlib
import errno
import logging
import os
import re
import socket
import time
import weakref

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from fairseq_adaptive.errors import UsageError

NAME = "training.lock"  # in --save-dir, as long as a training lives
logger = logging.getLogger(__name__)
_held = {}  # from the path of a lock to its open file, in the process that holds it


def lock_save_dir():
    """A second training in a ``--save-dir`` is refused while the first lives.

    Both would write ``checkpoint_last.pt``. The system drops the lock when its process ends, however it ends, on NFS,
    too. Only the first worker takes it, and nobody with ``--no-save``.
    """
    from fairseq import checkpoint_utils
    from fairseq.distributed import utils as distributed_utils

    stock_load, stock_main = checkpoint_utils.load_checkpoint, distributed_utils.call_main

    def load_checkpoint(cfg, trainer, *args, **kwargs):
        master = distributed_utils.is_master(trainer.cfg.distributed_training)
        if master and not cfg.no_save and os.path.isdir(cfg.save_dir):
            weakref.finalize(trainer, release, acquire(cfg.save_dir))
        return stock_load(cfg, trainer, *args, **kwargs)

    def call_main(*args, **kwargs):
        try:
            return stock_main(*args, **kwargs)
        finally:
            for path in list(_held):
                release(path)

    checkpoint_utils.load_checkpoint, distributed_utils.call_main = load_checkpoint, call_main
    if hasattr(os, "register_at_fork"):
        # else a worker that reads data holds the lock of a training that was killed
        os.register_at_fork(after_in_child=_let_go)


def acquire(folder) -> str:
    """Lock a folder for this process, which may do so again; return the path of the lock.

    Raises:
        UsageError: when a training of another process has it
    """
    path = os.path.join(os.path.realpath(folder), NAME)
    while path not in _held:
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise UsageError(f"--save-dir {folder} cannot be locked: {path}: {error.strerror}") from None
        kept = _try_lock(lock)
        owner = os.read(lock, 1000).decode(errors="replace").strip()
        if kept is False or (kept is None and _lives(owner)):
            os.close(lock)
            raise UsageError(
                f"--save-dir {folder} is in use by another training ({owner or 'which has just begun'}): wait until it "
                "has ended, or name another folder"
            )
        try:
            current = os.path.samestat(os.fstat(lock), os.stat(path))
        except FileNotFoundError:
            current = False
        if not current:  # who had it has just ended and removed the file
            os.close(lock)
            continue
        host = re.search(r" on (\S+) since ", owner)
        if host and host[1] != socket.gethostname():
            logger.warning(
                f"the last training in {folder} ({owner}) did not end by itself: see that it lives no more, as a lock is "
                "not seen from everywhere on some network file systems"
            )
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        with contextlib.suppress(OSError):  # a full disk: it is locked all the same
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()} since {since}\n".encode(), 0)
        _held[path] = lock
    return path


def release(path):
    """Give back what :func:`acquire` returned; does nothing in a process that does not hold it."""
    if path in _held:
        with contextlib.suppress(OSError):  # the folder is gone
            os.unlink(path)
        os.close(_held.pop(path))


def _try_lock(lock):
    """Whether this process has the lock now; None on a file system that has none."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError as error:
        return False if error.errno in (errno.EAGAIN, errno.EACCES) else None


def _lives(owner):
    """Whether the process that a lock names is one of this machine's."""
    process = re.match(r"process (\d+) on (\S+) since ", owner)
    if not process or process[2] != socket.gethostname() or int(process[1]) == os.getpid():
        return False
    try:
        os.kill(int(process[1]), 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # of another user
    return True


def _let_go():
    for path in list(_held):
        os.close(_held.pop(path))

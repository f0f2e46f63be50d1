"""A process group within the test's own process."""

import contextlib
import time

import torch.distributed as dist


@contextlib.contextmanager
def one_worker(folder):
    """A gloo group of this process alone; ``folder`` is for its store.

    Gloo's thread frees what it has done, and for that it may need Python's lock (the hooks of ``--offload-activations`` are
    objects of Python); whoever frees the group holds the lock and waits for the thread. So the thread gets the lock first.
    """
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        time.sleep(0.2)
        dist.destroy_process_group()

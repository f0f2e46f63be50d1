"""What a model says in several threads, and what it keeps."""

import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import torch

from fairseq_adaptive.modules import Trace


def kept():
    """How many tensors and traces there are."""
    gc.collect()
    return sum(isinstance(each, (torch.Tensor, Trace)) for each in gc.get_objects())


def assert_threads_equal_one(call, inputs, same, times=30):
    """``call(each)`` says the same in 8 threads at a time as alone, and leaves nothing behind.

    Args:
        call: of a model
        inputs: each unlike the others
        same: ``same(one, other)``, whether two answers are equal
        times: how often each thread asks
    """
    expected = [call(each) for each in inputs]
    assert not any(same(expected[0], other) for other in expected[1:])
    start = threading.Barrier(8)

    def ask(thread):
        start.wait()
        wrong = 0
        for time in range(times):
            number = (thread + time) % len(inputs)
            wrong += not same(call(inputs[number]), expected[number])
        return wrong

    call(inputs[0])  # a model of the hub keeps the trace of its last call in each thread: let that be the same one
    before = kept()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(8))) == [0] * 8
    after = kept()
    for _ in range(times):
        call(inputs[0])
    assert kept() - after <= 0 and after - before <= 0, (before, after, kept())

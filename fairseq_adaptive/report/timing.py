"""Seconds and peak memory of models and of their counterparts, measured in turn."""

import contextlib
import ctypes
import statistics
import time
from typing import List, Optional, Tuple

import torch

from fairseq_adaptive.modules.layers.prepacked_linear import constant_weights
from fairseq_adaptive.progress import progress
from fairseq_adaptive.report.evaluated import Evaluated


def measure(models: List[Evaluated], rounds: int) -> List[List[Tuple[float, Optional[int]]]]:
    """Seconds and peak memory of each model and, where it has one, of its counterpart, all in turn.

    Args:
        models: on one device
        rounds: how often; the medians count, and a round before them is left out

    Returns:
        for each model that of itself and of its counterpart: seconds of all batches, and bytes at the peak above what was
        there before, None where the system does not tell
    """
    runs = [(each, counterpart) for each in models for counterpart in (False, True)[: 1 + each.has_counterpart]]
    found = [[] for _ in runs]
    with constant_weights():
        for turn in progress(range(rounds + 1), "rounds of timing"):
            for (each, counterpart), results in zip(runs, found):
                with each.counterpart() if counterpart else contextlib.nullcontext():
                    result = _timed(each)
                results += [result] if turn else []
    medians = []
    for results in found:
        seconds, peaks = zip(*results)
        medians.append((statistics.median(seconds), None if None in peaks else int(statistics.median(peaks))))
    return [[median for (other, _), median in zip(runs, medians) if other is each] for each in models]


def _timed(evaluated: Evaluated) -> Tuple[float, Optional[int]]:
    device = next(evaluated.model.parameters()).device
    before = _start_memory(device)
    start = time.perf_counter()
    evaluated.run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    if before is None:
        return seconds, None
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident("VmHWM")
    return seconds, max(0, peak - before)


def _start_memory(device) -> Optional[int]:
    """Let the peak begin anew, and return what is taken now, bytes; None where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        ctypes.CDLL(None).malloc_trim(0)  # or freed memory is used again, unseen
        with open("/proc/self/clear_refs", "w") as request:
            request.write("5")
        return _resident("VmRSS")
    except (AttributeError, OSError, StopIteration):
        return None


def _resident(field: str) -> int:
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith(field))

"""How fast this machine multiplies matrices: measured once, and kept.

Products of torch (on most builds MKL's) and of oneDNN, with W as it is and laid out once, in float32 and bfloat16, at a
few sizes. The first product that has a choice measures, for :data:`LIMIT` seconds at most. The figures are kept as JSON in
the folder ``products`` of the user's cache (:func:`fairseq_adaptive.ops.native.cache`), in a file for each processor,
version of torch and number of threads, so that all runs on a machine choose alike; without the file it is measured again.

``FAIRSEQ_ADAPTIVE_PRODUCTS=auto|torch|onednn`` is for float32: ``auto``, the default, goes by the figures, the others say
which library multiplies, and nothing is measured.
"""

import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import tempfile
import threading
import time
from bisect import bisect
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Optional, Tuple

import torch
import torch.nn.functional as F

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.ops import native

logger = logging.getLogger(__name__)
VARIABLE = "FAIRSEQ_ADAPTIVE_PRODUCTS"
VERSION = 1  # of what is measured and how
LIMIT = 0.4  # seconds of the processor
KINDS = ("prepacked", "onednn", "torch")  # the one that is taken where others are no faster comes first
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROWS, WEIGHTS = (1, 16, 128, 512), ((256, 256), (2048, 512))
SIZES = [(rows, *weight) for weight in WEIGHTS for rows in ROWS]  # of x is [rows, I], of W [O, I]: (rows, O, I)
_NAMES = [f"{dtype} {kind}" for dtype in DTYPES for kind in KINDS]
NEAR = 1.1  # times as fast is no faster
_MOST = 1e6  # GFLOP/s of one product: beyond any processor
# which size stands for another: the nearest in the logarithm
_MORE_ROWS = [(one * other) ** 0.5 for one, other in zip(ROWS, ROWS[1:])]
_LARGE = 2**18  # elements of W
_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "ATEN_CPU_CAPABILITY")  # of libraries


def requested() -> str:
    """Return what the variable asks for; raises UsageError for what it cannot be."""
    asked = os.environ.get(VARIABLE) or "auto"
    if asked not in ("auto", "torch", "onednn"):
        raise UsageError(f"{VARIABLE}={asked} is unknown: choose one of auto, torch, onednn")
    return asked


@dataclass(frozen=True, eq=False)
class Figures:
    """GFLOP/s, 0 for what does not run here.

    Args:
        speeds: of ``"fp32 torch"`` and the like, for each of :data:`SIZES`
        place: the file, or None where they could not be kept
    """

    speeds: Dict[str, List[float]]
    place: Optional[Path] = None

    @functools.lru_cache(maxsize=4096)  # noqa: B019  there are few, and they stay
    def faster(self, rows: int, weights: int, kinds: Tuple[str, ...]) -> str:
        """Return which of some kinds, in their order, to take for float32: the first one than which no other is
        :data:`NEAR` times as fast. ``weights`` is the number of elements of W."""
        size = bisect(_MORE_ROWS, rows) + len(ROWS) * (weights > _LARGE)
        speeds = [self.speeds[f"fp32 {kind}"][size] for kind in kinds]
        return next(kind for kind, speed in zip(kinds, speeds) if speed * NEAR >= max(speeds))

    def training(self, dtype: str) -> float:
        """Return GFLOP/s of products of 128 rows or more as training has them: W changes, and bfloat16 is torch's."""
        kinds = KINDS[1:] if requested() == "auto" else (requested(),)
        work = seconds = 0
        for number, (rows, outer, inner) in enumerate(SIZES):
            if rows >= 128:
                kind = self.faster(rows, outer * inner, kinds) if dtype == "fp32" else "torch"
                work += rows * outer * inner
                seconds += rows * outer * inner / max(self.speeds[f"{dtype} {kind}"][number], 0.01)
        return work / seconds


def _calls(rows, outer, inner):
    """Products by dtype and kind, without those that do not run here."""
    calls, onednn = {}, getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    for name, dtype in DTYPES.items():
        # no random numbers, else what follows would draw others
        x, weight = (torch.ones(n, inner, dtype=dtype, device="cpu") for n in (rows, outer))
        calls[f"{name} torch"] = lambda x=x, weight=weight: F.linear(x, weight)
        if onednn is None or not torch.backends.mkldnn.is_available():
            continue
        with contextlib.suppress(RuntimeError):  # no bfloat16 on this processor
            packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
            onednn(x[:1], packed, None, "none", [], "")
            calls[f"{name} onednn"] = lambda x=x, weight=weight: onednn(x, weight, None, "none", [], "")
            calls[f"{name} prepacked"] = lambda x=x, packed=packed: onednn(x, packed, None, "none", [], "")
    return calls


def measure(threads: int) -> Dict[str, List[float]]:
    """Return the speeds of :class:`Figures`: the best of a few turns, one after the other in each.

    With one thread it is the thread's own time that counts, else other processes would choose. A product that would take
    longer than its share of the time has the speed that it has with fewer rows.
    """
    torch.set_num_threads(threads)  # this thread is new
    clock = time.thread_time if threads == 1 else time.perf_counter
    speeds: Dict[str, List[float]] = {name: [] for name in _NAMES}
    end = clock() + LIMIT
    for number, size in enumerate(SIZES):
        start, work = clock(), 2e-9 * math.prod(size)
        share, calls = (end - start) / (len(SIZES) - number), _calls(*size)
        best = dict.fromkeys(_NAMES, 0.0)
        if number % len(ROWS):
            for name in [name for name in calls if work > speeds[name][-1] * share / len(calls)]:
                best[name] = speeds[name][-1]
                del calls[name]
        for _ in range(8):
            for name, call in calls.items():
                begun = clock()
                call()
                best[name] = max(best[name], work / max(clock() - begun, 1e-9))
            if clock() - start > share:
                break
        for name in _NAMES:
            speeds[name].append(best[name] and round(min(max(best[name], 0.01), _MOST), 2))
    return speeds


def _key(threads: int) -> str:
    told = native.processor(), torch.__version__, threads, VERSION, *map(os.environ.get, _LIMITS)
    return hashlib.sha256(repr(told).encode()).hexdigest()[:24]


def _read(path: Path, key: str) -> Optional[Figures]:
    """What is kept, or None where that is missing, damaged, another machine's or somebody else's."""
    try:
        if not native.ours(path):
            return None
        kept = json.loads(path.read_text(encoding="utf-8"))
        speeds = {name: kept["GFLOP/s"][name] for name in _NAMES}
        right = kept["key"] == key and all(len(each) == len(SIZES) for each in speeds.values())
        numbers = all(type(n) in (int, float) and 0 <= n <= _MOST for each in speeds.values() for n in each)
        runs = all(speeds["fp32 torch"] + speeds["bf16 torch"])  # everywhere
        return Figures(speeds, path) if right and numbers and runs else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def _keep(speeds, path: Path, key: str) -> Figures:
    """Return what is in the file in the end: of several processes that write at once, all take what one has written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(prefix=".part.", dir=path.parent) as folder:
            part = Path(folder) / path.name
            part.write_text(json.dumps({"key": key, "sizes": SIZES, "GFLOP/s": speeds}, indent=1), encoding="utf-8")
            part.chmod(0o600)
            try:
                os.link(part, path)  # unlike a renamed file it replaces none
            except OSError:  # there is one, or there are no links
                if _read(path, key) is None:
                    os.replace(part, path)
    except OSError as error:
        said = "speeds of products cannot be kept, and other runs may choose otherwise (%s=onednn keeps to one library): %s"
        logger.warning(said, VARIABLE, error)
        return Figures(speeds)
    return _read(path, key) or Figures(speeds)


_KNOWN: Dict[int, Figures] = {}
_LOCK = threading.Lock()


def figures(threads: int) -> Figures:
    """Return the figures for a number of threads, which are read or measured once a process.

    They are measured in a thread of their own, where neither autocast nor what watches operations is in force.
    """
    if threads in _KNOWN:
        return _KNOWN[threads]
    with _LOCK:
        if threads not in _KNOWN:
            key = _key(threads)
            path = native.cache("products") / f"{key}.json"
            found = _read(path, key)
            if found is None:
                logger.info("measuring speeds of matrix products (fairseq-adaptive info shows them)")
                with ThreadPoolExecutor(1) as pool:
                    found = _keep(pool.submit(measure, threads).result(), path, key)
            _KNOWN[threads] = found
    return _KNOWN[threads]

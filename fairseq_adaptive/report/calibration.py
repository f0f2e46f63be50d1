"""What a softmax costs on the present device, for :mod:`fairseq_adaptive.report.cutoffs`."""

import itertools
import statistics
import time
from typing import List, Sequence

import numpy as np
import torch

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules.vocabulary.adaptive_softmax import AdaptiveSoftmax
from fairseq_adaptive.progress import progress
from fairseq_adaptive.report.cutoffs import Costs, Shape

TRIES = 3  # of a calibration, on a machine that does other things, too


def require_scipy():
    """Return its non-negative least squares.

    Raises:
        UsageError: when it is not installed
    """
    try:
        from scipy.optimize import nnls
    except ImportError as error:
        raise UsageError(
            "--calibrate needs scipy: pip install scipy, or give what softmaxes cost with --costs"
        ) from error
    return nnls


def measure_costs(shape: Shape, device: str = "cpu", seconds: float = 10.0) -> Costs:
    """Time softmaxes of several sizes, forward and backward, and fit the constants of their costs.

    Where the times do not grow with the work, since the machine did something else meanwhile, they are taken again.

    Args:
        shape: of the model; batches and widths up to its own are timed
        device: where
        seconds: larger softmaxes are left out after this time

    Raises:
        UsageError: when scipy is not installed, and after three tries without costs
    """
    require_scipy()
    for _ in range(TRIES):
        rows, times = _times(shape, device, seconds)
        offset, mac, logit, weight = _fit(rows, times)
        if mac + logit > 0:
            return Costs(float(times.min()), offset, mac, logit, weight)
    raise UsageError(
        f"--calibrate: in {TRIES} tries times did not grow with the work, the machine is too busy to measure: try again "
        "when it is not, or give --costs"
    )


def measure_cutoffs(
    found: Sequence[Sequence[int]], counts: Sequence[int], shape: Shape, device: str = "cpu", rounds: int = 5
) -> List[float]:
    """Milliseconds of an adaptive softmax with each of some cutoffs, forward and backward, all in turn.

    Args:
        found: cutoffs, each a list; an empty one is the full softmax
        counts: of the vocabulary ``[V]``, from which targets are drawn
        shape: of the model
        device: where
        rounds: how often; the median counts
    """
    generator, odds = torch.Generator().manual_seed(1), torch.as_tensor(np.asarray(counts, dtype=np.float64))
    target = torch.searchsorted(odds.cumsum(0) / odds.sum(), torch.rand(shape.tokens, generator=generator).double())
    target, times = target.clamp_max(len(counts) - 1).to(device), [[] for _ in found]
    for turn in progress(range(rounds + 1), "rounds of timing"):  # the first warms up
        for cutoffs, taken in zip(found, times):
            factor = shape.factor if cutoffs else 1.0
            softmax = AdaptiveSoftmax(len(counts), tuple(cutoffs), shape.hidden_dim, factor).to(device)
            hidden = torch.randn(shape.tokens, shape.hidden_dim, device=device, requires_grad=True)
            measured = _pass(softmax, hidden, target, device)
            taken.extend([measured] if turn else [])
            del softmax, hidden
    return [statistics.median(taken) for taken in times]


def _times(shape, device, seconds):
    """What each timed softmax has of the constants, and its milliseconds."""
    widths = sorted({max(shape.hidden_dim // 8, 1), shape.hidden_dim})
    batches = sorted({min(batch, shape.tokens) for batch in (16, 128, 1024, shape.tokens)})
    grid = sorted(itertools.product(widths, batches, (8, 256, 1024, 4096, 16384, 65536)), key=np.prod)
    deadline = time.perf_counter() + seconds
    rows, times = [], []
    for width, batch, size in progress(grid, "softmaxes"):
        if time.perf_counter() > deadline:
            break
        if batch * size > 2**25:
            continue
        times.append(_milliseconds(width, batch, size, device))
        rows.append((1.0, 1e-9 * batch * size * width, 1e-9 * batch * size, 1e-9 * size * width))
    return np.array(rows), np.array(times)


def _milliseconds(width, batch, size, device):
    softmax = AdaptiveSoftmax(size, (), width).to(device)
    hidden = torch.randn(batch, width, device=device, requires_grad=True)
    target = torch.randint(size, (batch,), device=device)
    return min(_pass(softmax, hidden, target, device) for _ in range(4))  # what else the machine does only adds


def _pass(softmax, hidden, target, device) -> float:
    """Milliseconds of one pass forward and backward."""
    softmax.zero_grad()
    start = time.perf_counter()
    softmax(hidden, target)[0].sum().backward()
    if device != "cpu":
        torch.cuda.synchronize(device)
    return 1000 * (time.perf_counter() - start)


def _fit(rows, times):
    """Least squares with each time weighted by the inverse of its root, so that neither short nor long ones decide alone;
    coefficients are 0 or more."""
    weights = times**-0.5
    scale = np.linalg.norm(rows * weights[:, None], axis=0)  # columns are of very different size
    values, _ = require_scipy()(rows * weights[:, None] / scale, times * weights)
    return (values / scale).tolist()

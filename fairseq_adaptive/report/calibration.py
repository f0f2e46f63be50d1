"""What a softmax costs on the present device, for :mod:`fairseq_adaptive.report.cutoffs`."""

import itertools
import time

import numpy as np
import torch

from fairseq_adaptive.modules.vocabulary.adaptive_softmax import AdaptiveSoftmax
from fairseq_adaptive.report.cutoffs import Costs, Shape


def measure_costs(shape: Shape, device: str = "cpu", seconds: float = 10.0) -> Costs:
    """Time softmaxes of several sizes, forward and backward, and fit the constants of their costs.

    Args:
        shape: of the model; batches and widths up to its own are timed
        device: where
        seconds: larger softmaxes are left out after this time
    """
    widths = sorted({max(shape.hidden_dim // 8, 1), shape.hidden_dim})
    batches = sorted({min(batch, shape.tokens) for batch in (16, 128, 1024, shape.tokens)})
    grid = sorted(itertools.product(widths, batches, (8, 256, 1024, 4096, 16384, 65536)), key=np.prod)
    deadline = time.perf_counter() + seconds
    rows, times = [], []
    for width, batch, size in grid:
        if time.perf_counter() > deadline:
            break
        if batch * size > 2**25:
            continue
        times.append(_milliseconds(width, batch, size, device))
        rows.append((1.0, 1e-9 * batch * size * width, 1e-9 * batch * size, 1e-9 * size * width))
    offset, mac, logit, weight = _fit(np.array(rows), np.array(times))
    return Costs(min(times), offset, mac, logit, weight)


def _milliseconds(width, batch, size, device):
    softmax = AdaptiveSoftmax(size, (), width).to(device)
    hidden = torch.randn(batch, width, device=device, requires_grad=True)
    target = torch.randint(size, (batch,), device=device)
    times = []
    for _ in range(4):
        softmax.zero_grad()
        start = time.perf_counter()
        softmax(hidden, target)[0].sum().backward()
        if device != "cpu":
            torch.cuda.synchronize(device)
        times.append(1000 * (time.perf_counter() - start))
    return min(times)  # what else the machine does only adds


def _fit(rows, times):
    """Least squares with each time weighted by its inverse, so that neither short nor long ones decide alone.

    Coefficients are 0 or more: the most negative one is left out until there is none.
    """
    weights = times**-0.5
    kept, found = list(range(rows.shape[1])), np.zeros(rows.shape[1])
    while True:
        values = np.linalg.lstsq(rows[:, kept] * weights[:, None], times * weights, rcond=None)[0]
        if values.min() >= 0:
            found[kept] = values
            return found.tolist()
        del kept[int(values.argmin())]

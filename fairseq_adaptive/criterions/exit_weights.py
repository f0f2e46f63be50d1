"""How much the loss of each depth weighs in a training for early exit, and at which depths there is one."""

import math
from typing import List

from fairseq_adaptive.errors import UsageError

WEIGHTS = {
    "uniform": lambda depth: 1.0,
    "linear": lambda depth: depth + 1.0,
    "cumulative": lambda depth: (depth + 1) * (depth + 2) / 2,
    "sqrt": lambda depth: math.sqrt(depth + 1),
}
CURRICULA = ("none", "rotational", "gradual")


def exit_weights(kind: str, depths: List[int], last: int, scale: float = 1.0) -> List[float]:
    """Return the weights e(l) f(l) / sum of them, of some depths; e is ``scale``, of the last depth 1.

    >>> exit_weights("linear", [0, 2, 3], 3)
    [0.125, 0.375, 0.5]

    Args:
        kind: f, one of :data:`WEIGHTS`
        depths: counted from 0, the last among them
        last: N - 1
        scale: of all depths but the last

    Raises:
        UsageError: for another kind
    """
    if kind not in WEIGHTS:
        raise UsageError(f"unknown --exit-weights {kind!r}: choose one of {', '.join(WEIGHTS)}")
    found = [WEIGHTS[kind](depth) * (1.0 if depth == last else scale) for depth in depths]
    return [each / sum(found) for each in found]


def exit_depths(curriculum: str, depths: int, update: int, every: int = 1, updates: int = 0) -> List[int]:
    """Return the depths, counted from 0, that have a loss in an update; the last always has one.

    ``rotational`` takes every R-th depth, and in each update those one further. ``gradual`` begins with the last depth and
    takes one more, downwards, after each N-th part of ``updates``.

    >>> [exit_depths("rotational", 6, update, every=3) for update in range(2)]
    [[0, 3, 5], [1, 4, 5]]
    >>> [exit_depths("gradual", 4, update, updates=8) for update in (0, 2, 6)]
    [[3], [2, 3], [0, 1, 2, 3]]

    Args:
        curriculum: one of :data:`CURRICULA`
        depths: N
        update: how many there were
        every: R
        updates: after how many all depths are there

    Raises:
        UsageError: for another curriculum
    """
    if curriculum not in CURRICULA:
        raise UsageError(f"unknown --exit-curriculum {curriculum!r}: choose one of {', '.join(CURRICULA)}")
    if curriculum == "rotational":
        return [depth for depth in range(depths) if (depth - update) % every == 0 or depth == depths - 1]
    first = 0
    if curriculum == "gradual" and update < updates:
        first = depths - 1 - update * depths // updates
    return list(range(first, depths))

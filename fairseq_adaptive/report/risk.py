"""Thresholds with a guarantee: Learn then Test (Angelopoulos et al., 2021), as CALM uses it (Schuster et al., 2022)."""

import math
from typing import Callable, Iterable, Iterator, NamedTuple, Sequence


class Tested(NamedTuple):
    """A value of a knob.

    Attributes:
        value: of the knob
        loss: mean over the examples
        p: the p-value of "its risk is above the tolerance"
        kept: whether that is rejected: the risk is within the tolerance
    """

    value: float
    loss: float
    p: float
    kept: bool


def binomial_tail(least: int, count: int, share: float) -> float:
    """The probability that of ``count`` draws, each a hit with probability ``share`` in (0, 1), at most ``least`` hit."""
    if least >= count:
        return 1.0
    logs = [
        math.lgamma(count + 1)
        - math.lgamma(hits + 1)
        - math.lgamma(count - hits + 1)
        + hits * math.log(share)
        + (count - hits) * math.log1p(-share)
        for hits in range(least + 1)
    ]
    return min(1.0, math.fsum(map(math.exp, logs)))


def hoeffding_bentkus(mean: float, count: int, tolerance: float) -> float:
    """The p-value of "the expected loss is above the tolerance", valid for independent losses in [0, 1].

    The lesser of Hoeffding's bound, exp(-n h(min(mean, tolerance), tolerance)) with h the divergence between two coins, and
    Bentkus's, e P(Bin(n, tolerance) <= ceil(n mean)) (Bates et al., *Distribution-free, risk-controlling prediction sets*,
    2021, Section 3.1; Angelopoulos et al., 2021, Section 2).

    Args:
        mean: of the losses, in [0, 1]
        count: n, how many there are, 1 or more
        tolerance: in (0, 1)
    """
    below = min(mean, tolerance)
    divergence = below * math.log(below / tolerance) if below else 0.0
    if below < 1:
        divergence += (1 - below) * math.log((1 - below) / (1 - tolerance))
    hits = math.ceil(count * mean - 1e-9 * max(1.0, count * mean))  # a sum of thirds is no whole number plus a little
    return min(1.0, math.exp(-count * divergence), math.e * binomial_tail(hits, count, tolerance))


def examples_needed(tolerance: float, confidence: float) -> int:
    """From how many examples on a p-value can be at most 1 - confidence: where no loss is above 0 it is
    (1 - tolerance)^n."""
    return max(1, math.ceil(math.log(1 - confidence) / math.log1p(-tolerance) - 1e-9))


def fixed_sequence(
    values: Iterable[float], losses_of: Callable[[float], Sequence[float]], tolerance: float, confidence: float
) -> Iterator[Tested]:
    """Test values one by one, up to the first that is not kept; all that are kept are within the tolerance at once with the
    confidence (Angelopoulos et al., 2021, Section 2.3, fixed sequence testing).

    Args:
        values: of the knob, in an order that does not depend on the losses, the most careful first
        losses_of: the losses of the examples at a value, each in [0, 1]; called for values that are tested only
        tolerance: of the expected loss, in (0, 1)
        confidence: in (0, 1)
    """
    for value in values:
        losses = losses_of(value)
        mean = math.fsum(losses) / len(losses)
        p = hoeffding_bentkus(mean, len(losses), tolerance)
        yield Tested(value, mean, p, p <= 1 - confidence)
        if p > 1 - confidence:
            return

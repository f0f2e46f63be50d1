"""The cutoffs that make an adaptive softmax fastest (Grave et al. 2017, *Efficient softmax approximation for GPUs*)."""

import os
from dataclasses import dataclass
from typing import List, Optional, Sequence, Tuple

import numpy as np

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.files import read_lines
from fairseq_adaptive.ranges import COUNT, FACTOR, WIDTH
from fairseq_adaptive.report.pictures import pyplot, save_figure

WORTH = 1.03  # how much slower fewer clusters may be


@dataclass(frozen=True)
class Costs:
    """Milliseconds of one softmax, forward and backward: ``max(floor, offset + mac * MACs + logit * logits + ...)``.

    The paper's g(k, B) has ``floor``, ``offset`` and one slope.

    Args:
        floor: the least that any softmax takes, ms
        offset: ms
        mac: ms for 10^9 multiply-adds of the forward pass
        logit: ms for 10^9 logits: exponentials, and memory for their gradients
        weight: ms for 10^9 weights, read and given gradients however few the tokens
    """

    floor: float
    offset: float
    mac: float
    logit: float = 0.0
    weight: float = 0.0

    def __post_init__(self):
        numbers = (self.floor, self.offset, self.mac, self.logit, self.weight)
        if not all(0 <= number < float("inf") for number in numbers) or self.mac + self.logit <= 0:
            raise UsageError(f"costs must be 0 or more, and those of multiply-adds or logits above 0, not {self}")

    def time(self, tokens, size, width, projected_from=0):
        """Milliseconds of ``tokens`` targets over ``size`` words of ``width``, projected to it from another width."""
        weights = width * (size + projected_from)
        linear = self.mac * tokens * weights + self.logit * tokens * size + self.weight * weights
        return np.maximum(self.floor, self.offset + 1e-9 * linear)


@dataclass(frozen=True)
class Shape:
    """An adaptive softmax but for its cutoffs: width, how much narrower each cluster is, targets in a batch."""

    hidden_dim: int
    factor: float
    tokens: int

    def __post_init__(self):
        WIDTH.check(self.hidden_dim, "the hidden dimension")
        FACTOR.check(self.factor, "the factor")
        COUNT.check(self.tokens, "the tokens of a batch")

    def time(self, costs: Costs, cluster: int, tokens, size):
        """Milliseconds of one cluster (0 is the head)."""
        width = int(self.hidden_dim // self.factor**cluster)
        if width < 1:
            raise UsageError(
                f"a factor of {self.factor:g} leaves cluster {cluster + 1} of a hidden dimension of "
                f"{self.hidden_dim} no width: ask for fewer clusters, or a smaller factor"
            )
        return costs.time(tokens, size, width, self.hidden_dim if self.factor > 1 else 0)


def read_counts(path, dictionary: bool) -> np.ndarray:
    """Return how often each entry of fairseq's vocabulary occurs ``[V]``, in the order of their numbers.

    Args:
        path: text
        dictionary: whether it is a ``dict.txt``, which fairseq loads; else one count a line, or ``word count``, to
            which fairseq-preprocess would add its four special symbols and fill up to a multiple of eight

    Raises:
        UsageError: when the file is missing, malformed, empty, or not sorted with the most frequent word first
    """
    from fairseq.data import Dictionary

    if not os.path.isfile(path):
        raise UsageError(f"{path} is no file: name a dict.txt of fairseq-preprocess, or a file of counts")
    if dictionary:
        try:
            words = Dictionary.load(str(path))
        except Exception as error:
            raise UsageError(f"{path} is no dictionary of fairseq: {error}") from error
    else:
        words = Dictionary()
        for number, line in enumerate(read_lines(path), start=1):
            try:
                words.count.append(int(line.split()[-1]))
            except (IndexError, ValueError):
                raise UsageError(
                    f"line {number} of {path} does not end with a whole number: each must be a count, "
                    "or a word and its count"
                ) from None
        words.count += [0] * (-len(words.count) % 8)
    if max(map(abs, words.count)) >= 1 << 53:
        raise UsageError(f"{path} has a count of {max(map(abs, words.count))}, which no text has")
    counts = np.array(words.count, dtype=np.int64)
    named = counts[words.nspecial :]
    if not named.any() or named.min() < 0:
        raise UsageError(f"{path} must hold counts of 0 or more, not all 0")
    rises = np.flatnonzero(np.diff(named) > 0)
    if len(rises):
        raise UsageError(
            f"{path} is not sorted: line {rises[0] + 2} has a higher count than the one before. Clusters are for words "
            "in order of frequency, the most frequent first, as fairseq-preprocess sorts them without --srcdict"
        )
    return counts


def optimal_cutoffs(
    counts: Sequence[int], clusters: int, costs: Costs, shape: Shape, least_head: int = 1
) -> Tuple[List[int], float]:
    """Return the cutoffs that take the least time, and that time (ms); of equal ones some.

    With cutoffs c_1 < ... < c_K and c_(K+1) = V the time is that of a head over ``c_1 + K`` entries with all tokens
    plus, for each tail, w(c_i, c_(i+1)): the time of its words with its share of the tokens. The best tail i that
    ends at b starts where ``best_(i-1)(a) + w(a, b)`` is least. For all b at once this takes O(V log V), and everything
    O(K V log V), as the best a never decreases with b. Divide and conquer therefore finds it: the best a of the middle
    b bounds those of both halves. It never decreases because w satisfies the quadrangle inequality ("is Monge"):

        w(a, c) + w(b, d) <= w(a, d) + w(b, c)  for a <= b <= c <= d.

    Proof. Let x, y, z be the numbers of words and P, Q, R the shares of tokens in [a, b), [b, c) and [c, d), none of
    them negative. A tail of k words with share p takes g(f), f = u kp + v p + s k + t with u, v, s, t >= 0. The terms
    v p, s k and t are sums over words or constant, and give both sides the same. Of kp, right less left is
    (x+y+z)(P+Q+R) + yQ - (x+y)(P+Q) - (y+z)(Q+R) = xR + zP >= 0. So f satisfies it. Now g(f) = max(floor, offset + f)
    is convex and nondecreasing. Write l = f(b, c), m and n for f(a, c) and f(b, d), h = f(a, d). As f grows with its
    interval, l <= m, n; and m + n <= l + h. Then m and n lie between l and h' = m + n - l <= h, with the same sum as l
    and h', whence g(m) + g(n) <= g(l) + g(h') by convexity, and g(h') <= g(h). QED. If a' < a are starts of which the
    later is the better for b, adding the inequality of a', a, b, b' shows it is the better for b' > b, too.

    Nothing is asked of the head, of the order of counts, or of different tails: u, v, s, t may differ by tail. Measured
    tables of times, or times that go up in steps of a tile, are not of this kind.

    Args:
        counts: of each entry of the vocabulary ``[V]``
        clusters: K + 1, the head among them; 1 is the full softmax, without cutoffs
        costs: of a softmax
        shape: of the model
        least_head: entries that must be in the head: fairseq's special symbols

    Raises:
        UsageError: when there are not enough words
    """
    counts = np.asarray(counts, dtype=np.float64)
    vocab_size, tails = len(counts), clusters - 1
    if clusters < 1 or least_head + tails > vocab_size:
        raise UsageError(
            f"a vocabulary of {vocab_size} entries, of which at least {least_head} are in the first cluster, has 1 to "
            f"{vocab_size - least_head + 1} clusters, not {clusters}"
        )
    if not tails:
        # a softmax over all words is never projected
        return [], float(costs.time(shape.tokens, vocab_size, shape.hidden_dim))
    mass = np.concatenate(([0.0], counts.cumsum())) * (shape.tokens / counts.sum())
    best = shape.time(costs, 0, shape.tokens, np.arange(vocab_size + 1) + tails)
    starts = []
    for tail in range(1, tails + 1):

        def time(start, end, tail=tail):
            return shape.time(costs, tail, mass[end] - mass[start], end - start)

        # tail i starts after the least head and a word in each tail before, and leaves one to each tail behind
        first, last = least_head + tail, vocab_size - tails + tail
        best, start = _best_starts(best, time, first if tail < tails else last, last, first - 1)
        starts.append(start)
    cutoffs, end = [], vocab_size
    for start in reversed(starts):
        end = int(start[end])
        cutoffs.insert(0, end)
    return cutoffs, float(best[vocab_size])


def _best_starts(before, time, first_end, last_end, first_start):
    """For each end from first_end to last_end, the least ``before[start] + time(start, end)``, and its start.

    All intervals of one depth of the recursion are searched in one pass: their candidates lie behind one another.
    """
    best, best_start = np.full(len(before), np.inf), np.zeros(len(before), dtype=np.int64)
    low, high = np.array([first_end]), np.array([last_end])
    left, right = np.array([first_start]), np.array([last_end - 1])
    while len(low):
        end = (low + high) // 2
        lengths = np.minimum(right, end - 1) - left + 1
        offsets = lengths.cumsum() - lengths
        start = np.arange(lengths.sum()) - np.repeat(offsets - left, lengths)
        times = before[start] + time(start, np.repeat(end, lengths))
        least = np.minimum.reduceat(times, offsets)
        hits = np.flatnonzero(times == np.repeat(least, lengths))
        chosen = start[hits[np.searchsorted(hits, offsets)]]
        best[end], best_start[end] = least, chosen
        low, high = np.concatenate((low, end + 1)), np.concatenate((end - 1, high))
        left, right = np.concatenate((left, chosen)), np.concatenate((chosen, right))
        rest = low <= high
        low, high, left, right = low[rest], high[rest], left[rest], right[rest]
    return best, best_start


def best_clusters(
    counts: Sequence[int], costs: Costs, shape: Shape, least_head: int = 1, most: int = 6
) -> List[Tuple[List[int], float]]:
    """Return :func:`optimal_cutoffs` for 1 to ``most`` clusters, or as many as the vocabulary and the width allow."""
    found: List[Tuple[List[int], float]] = []
    for clusters in range(1, min(most, len(counts) - least_head + 1) + 1):
        if shape.hidden_dim // shape.factor ** (clusters - 1) < 1:
            break
        found.append(optimal_cutoffs(counts, clusters, costs, shape, least_head))
    return found


def few_enough(times: Sequence[float]) -> int:
    """The place of the first of some times that is at most 3% above the least: a cluster more must be worth it, since
    predictions and measurements are no better than that."""
    return next(place for place, time in enumerate(times) if time <= WORTH * min(times))


def plot_times(found: Sequence[Tuple[List[int], float]], path, title: Optional[str] = None) -> None:
    """Draw the time of each number of clusters (:func:`best_clusters`) into a picture.

    Raises:
        UsageError: when matplotlib is not installed
    """
    plt = pyplot()
    figure = plt.figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="clusters (1: full softmax)", ylabel="ms a batch, forward and backward")
    axes.plot([len(cutoffs) + 1 for cutoffs, _ in found], [time for _, time in found], marker="o")
    axes.set_ylim(bottom=0)
    axes.set_xticks([len(cutoffs) + 1 for cutoffs, _ in found])
    axes.set_title(title or "")
    save_figure(figure, path)

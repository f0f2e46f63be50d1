import itertools
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from cli.helpers import run
from fairseq.data import Dictionary

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules.vocabulary.adaptive_softmax import AdaptiveSoftmax
from fairseq_adaptive.report import calibration
from fairseq_adaptive.report.calibration import _fit, measure_costs, measure_cutoffs
from fairseq_adaptive.report.cutoffs import (
    Costs,
    Shape,
    _best_starts,
    best_clusters,
    few_enough,
    optimal_cutoffs,
    plot_times,
    read_counts,
)

SCRIPT = Path(__file__).parents[2] / "scripts/optimal_cutoffs.py"
COSTS = [
    Costs(0.0, 0.0, 1e6),
    Costs(0.0, 0.4, 1e6, 3e7, 5e5),
    Costs(0.5, 0.1, 1e6, 0.0, 2e5),  # some tails take no more than the floor
    Costs(40.0, 0.0, 1e6),  # all do: everything ties
]


def time_of(cutoffs, counts, costs, shape):
    """The definition, cluster by cluster."""
    ends = [0, *cutoffs, len(counts)]
    if not cutoffs:
        macs = shape.tokens * len(counts) * shape.hidden_dim
        weights = len(counts) * shape.hidden_dim
        sizes = [(shape.tokens, len(counts), macs, weights)]
    else:
        sizes = []
        for cluster, (start, end) in enumerate(zip(ends, ends[1:])):
            tokens = shape.tokens * (sum(counts[start:end]) / sum(counts) if cluster else 1)
            size = end - start + (0 if cluster else len(cutoffs))
            width = int(shape.hidden_dim // shape.factor**cluster)
            weights = size * width + (shape.hidden_dim * width if shape.factor > 1 else 0)
            sizes.append((tokens, size, tokens * weights, weights))
    total = 0
    for tokens, size, macs, weights in sizes:
        linear = costs.mac * macs + costs.logit * tokens * size + costs.weight * weights
        total += max(costs.floor, costs.offset + 1e-9 * linear)
    return total


def vocabularies():
    rng = np.random.default_rng(1)
    yield np.ones(11, dtype=int)  # everything ties
    yield np.array([100, 1, 1, 1, 1, 0, 0, 0, 0])
    for size in (2, 5, 9, 14):
        yield np.sort(rng.integers(0, 6, size))[::-1] + (np.arange(size) == 0)
        yield np.sort((1000 / (1 + rng.permutation(size))).astype(int))[::-1]
        yield rng.integers(1, 20, size)  # the order does not matter to the algorithm
    yield (1000 / np.arange(1, 41)).astype(int)


@pytest.mark.parametrize("costs", COSTS, ids=str)
@pytest.mark.parametrize("factor", (1.0, 2.0))
def test_equals_brute_force(costs, factor):
    shape = Shape(hidden_dim=16, factor=factor, tokens=8)
    for counts, clusters, least_head in itertools.product(vocabularies(), (1, 2, 3, 4), (1, 3)):
        choices = list(itertools.combinations(range(least_head, len(counts)), clusters - 1))
        if not choices or least_head >= len(counts) or len(choices) > 1000:
            continue
        times = [time_of(choice, counts, costs, shape) for choice in choices]
        cutoffs, found = optimal_cutoffs(counts, clusters, costs, shape, least_head)
        assert found == pytest.approx(min(times), rel=1e-12)
        assert tuple(cutoffs) in choices
        assert time_of(cutoffs, counts, costs, shape) == pytest.approx(found, rel=1e-12)


@pytest.mark.parametrize("costs", COSTS, ids=str)
def test_tails_satisfy_the_quadrangle_inequality(costs):
    counts, shape = np.array([30, 9, 0, 4, 4, 1, 0, 1]), Shape(16, 2.0, 8)
    mass = np.concatenate(([0], counts.cumsum())) * 8 / counts.sum()

    def w(start, end):
        return shape.time(costs, 1, mass[end] - mass[start], end - start)

    for a, b, c, d in itertools.combinations_with_replacement(range(9), 4):
        assert w(a, c) + w(b, d) <= w(a, d) + w(b, c) + 1e-9


@pytest.mark.parametrize("costs", COSTS, ids=str)
def test_divide_and_conquer_finds_the_best_start_of_every_end(costs):
    rng, shape = np.random.default_rng(2), Shape(16, 1.0, 8)
    counts = rng.integers(0, 50, 150)
    mass = np.concatenate(([0], counts.cumsum())) * 8 / counts.sum()
    before = rng.random(151) * 50  # anything

    def time(start, end):
        return shape.time(costs, 1, mass[end] - mass[start], end - start)

    best, start = _best_starts(before, time, 4, 150, 2)
    for end in range(4, 151):
        candidates = np.arange(2, end)
        assert best[end] == (before[candidates] + time(candidates, end)).min()
        assert best[end] == before[start[end]] + time(start[end], end)


def test_wikitext_size_takes_a_second():
    counts = (1e8 / np.arange(1, 267_736)).astype(np.int64)
    start = time.process_time()
    cutoffs, best = optimal_cutoffs(counts, 4, Costs(0.2, 0.2, 30, 500, 50), Shape(410, 1.0, 4096), 4)
    assert time.process_time() - start < 5  # 0.4 on an idle core; O(N^2) would take hours
    shape = Shape(410, 1.0, 4096)
    for index, move in itertools.product(range(3), (-500, -1, 1, 500)):
        moved = [cutoff + move * (place == index) for place, cutoff in enumerate(cutoffs)]
        assert time_of(moved, counts, Costs(0.2, 0.2, 30, 500, 50), shape) >= best * (1 - 1e-12)


def test_best_clusters_stops_where_the_vocabulary_or_the_width_does():
    counts = [5, 4, 3, 2, 1]
    assert [len(cutoffs) for cutoffs, _ in best_clusters(counts, COSTS[0], Shape(16, 1.0, 8))] == [0, 1, 2, 3, 4]
    assert [len(cutoffs) for cutoffs, _ in best_clusters(counts, COSTS[0], Shape(16, 4.0, 8))] == [0, 1, 2]


def test_reads_dictionaries_as_fairseq_does(tmp_path):
    words = Dictionary()
    for number in range(21):
        words.add_symbol(f"w{number}", n=50 - number)
    words.finalize(padding_factor=8)
    words.save(str(tmp_path / "dict.txt"))
    counts = read_counts(tmp_path / "dict.txt", dictionary=True)
    assert counts.tolist() == Dictionary.load(str(tmp_path / "dict.txt")).count and len(counts) == len(words) == 32
    assert counts[4:].tolist() == [*range(50, 29, -1), *[0] * 7]
    for lines in ((f"{50 - n}" for n in range(21)), (f"w{n} {50 - n}" for n in range(21))):
        (tmp_path / "counts").write_text("\n".join(lines) + "\n")
        assert read_counts(tmp_path / "counts", dictionary=False).tolist() == counts.tolist()


@pytest.mark.parametrize(
    "text, dictionary, message",
    [
        ("a 1\nb 2\n", True, "not sorted: line 2"),
        ("3\n1\n2\n", False, "not sorted: line 3"),
        ("3\nmany\n", False, "line 2 .* does not end with a whole number"),
        ("a b c\n", True, "no dictionary of fairseq"),
        ("", False, "counts of 0 or more, not all 0"),
        ("3\n-1\n", False, "counts of 0 or more"),
        (None, True, "is no file"),
    ],
)
def test_refuses_bad_files(tmp_path, text, dictionary, message):
    if text is not None:
        (tmp_path / "file").write_text(text)
    with pytest.raises(UsageError, match=message):
        read_counts(tmp_path / "file", dictionary)


def test_refuses_impossible_numbers():
    with pytest.raises(UsageError, match="has 1 to 2 clusters, not 3"):
        optimal_cutoffs([3, 2, 1, 1, 1], 3, COSTS[0], Shape(16, 1.0, 8), least_head=4)
    with pytest.raises(UsageError, match="not 0"):
        optimal_cutoffs([3, 2, 1], 0, COSTS[0], Shape(16, 1.0, 8))
    with pytest.raises(UsageError, match="no width"):
        optimal_cutoffs([3, 2, 1, 1], 4, COSTS[0], Shape(16, 4.0, 8))
    with pytest.raises(UsageError, match="use a (whole )?number from 1 to"):
        Shape(16, 0.5, 8)
    with pytest.raises(UsageError, match="0 or more"):
        Costs(0, -1, 1)


def test_fit_finds_the_constants():
    rng = np.random.default_rng(0)
    rows = np.hstack((np.ones((30, 1)), rng.random((30, 3)) * 10 ** rng.uniform(-3, 1, (30, 1))))
    assert _fit(rows, rows @ [0.2, 3.0, 1.0, 0.5]) == pytest.approx([0.2, 3.0, 1.0, 0.5])
    assert min(_fit(rows, rows @ [0.2, 3.0, 1.0, 0.0] - 0.01 * rows[:, 3])) == 0


def test_times_of_a_busy_machine_are_taken_again(monkeypatch):
    """Times that do not grow with the work have no costs: what ended in "costs must be 0 or more, not Costs(mac=0.0)"."""
    rows = np.hstack((np.ones((12, 1)), np.geomspace(1e-3, 1, 12)[:, None] * np.array([[1.0, 0.3, 0.7]])))
    rows[:, 1:] *= np.random.default_rng(1).uniform(0.5, 1.5, (12, 3))
    flat, honest, tries = np.linspace(2, 1, 12), rows @ [0.1, 2.0, 1.0, 0.5], []

    def times(shape, device, seconds):
        tries.append(1)
        return rows, flat if len(tries) < busy else honest

    monkeypatch.setattr(calibration, "_times", times)
    busy = 3
    assert measure_costs(Shape(16, 1.0, 8)).mac == pytest.approx(2.0) and len(tries) == 3
    tries, busy = [], 9
    with pytest.raises(UsageError, match="in 3 tries times did not grow with the work"):
        measure_costs(Shape(16, 1.0, 8))


def test_without_scipy_costs_can_be_given(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(UsageError, match="pip install scipy, or give what softmaxes cost with --costs"):
        measure_costs(Shape(16, 1.0, 8))


def test_a_cluster_more_must_be_worth_it():
    assert few_enough([9.0, 4.05, 4.0, 3.99]) == 1
    assert few_enough([9.0, 5.0, 4.0, 3.0]) == 3 and few_enough([1.0]) == 0


def test_found_cutoffs_are_measured():
    times = measure_cutoffs(
        [[], [20], [20, 100]], [1000 // rank for rank in range(1, 401)], Shape(16, 1.0, 64), rounds=2
    )
    assert len(times) == 3 and min(times) > 0


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    plot_times([([], 3.0), ([10], 1.0)], tmp_path / "costs.png")
    assert (tmp_path / "costs.png").read_bytes().startswith(b"\x89PNG")


def test_command_prints_flags_to_paste(tmp_path):
    counts = [10000 // rank for rank in range(1, 997)]
    (tmp_path / "counts").write_text("".join(f"{count}\n" for count in counts))
    costs = "0.02,0.01,30,500,50"
    flags = ["--counts", tmp_path / "counts", "--costs", costs, "--hidden-dim", 64, "--tokens", 512, "--factor", 2]
    done = run("python", SCRIPT, *flags, "--clusters", 3, "--least-head", 100)
    shape = Shape(64, 2.0, 512)
    everything = [1, 1, 1, 1, *counts]
    cutoffs, best = optimal_cutoffs(everything, 3, Costs(*map(float, costs.split(","))), shape, 100)
    full = time_of([], everything, Costs(*map(float, costs.split(","))), shape)
    *_, predicted, flag = done.stdout.splitlines()
    assert flag == f"--adaptive-softmax-cutoff {cutoffs[0]},{cutoffs[1]} --adaptive-softmax-factor 2"
    assert f"{full / best:.2f} x the speed of the full softmax" in predicted
    AdaptiveSoftmax(1000, cutoffs, 64, 2.0)  # what is printed can be used

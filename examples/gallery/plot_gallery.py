#!/usr/bin/env python3
"""Draws quality over measured time for every mechanism, from the results.json of run.sh: a panel for each file.

A point is the mean over the seeds, its lines go from the least to the greatest of them in both directions. Of cells far outside
the legend has the number.
"""

import collections
import statistics

from cells import CELLS
from results import DIGITS, NAMES, QUALITY, by_cell, read_results

from fairseq_adaptive.command import run
from fairseq_adaptive.ranges import Parser
from fairseq_adaptive.report.pictures import pyplot, require_picture, save_figure

KINDS = {"plain": "s", "schedule": "o", "halting": "^", "router": "v", "several": "D"}  # of cells.py, and their markers
FAR = 3  # times the range of the middle half of the cells


def points(found):
    """Of each cell its name, kind, times and qualities, a number a seed; the fastest first."""
    quality = QUALITY[found["task"]]
    rows = [
        (name, CELLS[name].kind, [row["milliseconds"] for row in each], [row[quality] for row in each])
        for (name, _), each in by_cell(found).items()
    ]
    return sorted(rows, key=lambda row: sum(row[2]) / len(row[2]))


def whiskers(values):
    """Middle, and how far it is to the ends."""
    middle = sum(values) / len(values)
    return middle, [[middle - min(values)], [max(values) - middle]]


def ends(values):
    """From where to where qualities are drawn: without those that lie far from the middle half, to which an arrow points."""
    first, _, last = statistics.quantiles(values if len(values) > 1 else [*values, *values], n=4)
    low, high = first - FAR * (last - first), last + FAR * (last - first)
    inside = [each for each in values if low <= each <= high]
    room = 0.25 * (max(inside) - min(inside) or 1.0)
    return min(inside) - room, max(inside) + room


def draw(panel, title, found):
    """A panel; returns what is drawn. A marker is a kind of cell, and a colour a cell of that kind."""
    drawn, used, quality = points(found), collections.Counter(), QUALITY[found["task"]]
    low, high = ends([whiskers(qualities)[0] for *_, qualities in drawn])
    seeds = [each for *_, qualities in drawn if low <= whiskers(qualities)[0] <= high for each in qualities]
    low, high = min(low, *seeds), max(high, *seeds)  # lines are drawn whole
    lower = quality == "bits"
    for name, kind, times, qualities in sorted(drawn, key=lambda row: sum(row[3]) / len(row[3]), reverse=not lower):
        (x, across), (y, along), title_of = whiskers(times), whiskers(qualities), CELLS[name].title
        colour = "k" if kind == "plain" else f"C{used[kind]}"
        filled = colour if kind != "plain" or not used[kind] else "w"
        used[kind] += 1
        outside = not low <= y <= high
        panel.errorbar(
            x,
            min(max(y, low), high),
            xerr=across,
            yerr=None if outside else along,
            color=colour,
            markerfacecolor=filled,
            marker=KINDS[kind],
            linewidth=1,
            markersize=6,
            capsize=2,
            clip_on=False,
            label=f"{title_of}: {y:.{DIGITS[quality]}f}{' (outside)' if outside else ''}",
        )
    panel.set_ylim((high, low) if lower else (low, high))
    panel.set_xlim(0, 1.08 * max(max(times) for _, _, times, _ in drawn))
    panel.grid(alpha=0.25)
    panel.set(title=title, xlabel=f"ms a text (test, batches of {found['batch_size']}, {found['threads']} thread)")
    panel.set_ylabel(f"{NAMES[quality]} ({'lower is better: up' if lower else 'higher is better'})")
    panel.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return drawn


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("results", nargs="+", metavar="TITLE=JSON")
    parser.add_argument("--output", required=True, metavar="PNG", help="the picture; must not exist")
    args = parser.parse_args()
    require_picture(args.output)
    parts = [each.rpartition("=")[::2] for each in args.results]
    found = [read_results(path) for _, path in parts]
    plt = pyplot()
    figure, panels = plt.subplots(1, len(found), figsize=(7.2 * len(found), 4.2), squeeze=False, layout="constrained")
    for panel, (title, _), each in zip(panels[0], parts, found):
        draw(panel, title, each)
    save_figure(figure, args.output, dpi=110)
    print("wrote", args.output)


if __name__ == "__main__":
    run(main)

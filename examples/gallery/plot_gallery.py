#!/usr/bin/env python3
"""Draws quality over measured time for every mechanism, from the results.json of run.sh: a panel for each file.

A point is the mean over the seeds, its lines go from the least to the greatest of them in both directions.
"""

from cells import CELLS
from results import NAMES, QUALITY, by_cell, read_results

from fairseq_adaptive.command import run
from fairseq_adaptive.ranges import Parser
from fairseq_adaptive.report.pictures import pyplot, require_picture, save_figure

KINDS = {
    "plain": ("k", "s"),
    "schedule": ("C0", "o"),
    "halting": ("C1", "^"),
    "router": ("C2", "v"),
    "several": ("C3", "D"),
}


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


def draw(panel, title, found):
    """A panel; returns what is drawn."""
    drawn = points(found)
    for number, (name, kind, times, qualities) in enumerate(drawn):
        (colour, marker), (x, left), (y, down) = KINDS[kind], whiskers(times), whiskers(qualities)
        panel.errorbar(x, y, yerr=down, xerr=left, color=colour, marker=marker, linewidth=1, markersize=5, capsize=2)
        place = ((6, 4), (6, -9), (-6, 5), (-6, -10))[number % 4]
        panel.annotate(
            CELLS[name].title,
            (x, y),
            xytext=place,
            textcoords="offset points",
            fontsize=7,
            ha="left" if place[0] > 0 else "right",
        )
    lower = QUALITY[found["task"]] == "bits"
    if lower:
        panel.invert_yaxis()
    panel.margins(0.2, 0.1)
    panel.grid(alpha=0.25)
    better = "lower is better: up" if lower else "higher is better"
    panel.set(title=title, xlabel=f"ms a text (test, batches of {found['batch_size']}, 1 thread)")
    panel.set_ylabel(f"{NAMES[QUALITY[found['task']]]} ({better})")
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
    figure, panels = plt.subplots(1, len(found), figsize=(6.6 * len(found), 5.2), squeeze=False, layout="constrained")
    for panel, (title, _), each in zip(panels[0], parts, found):
        draw(panel, title, each)
    for kind, (colour, marker) in KINDS.items():
        panels[0][0].plot([], [], color=colour, marker=marker, linestyle="", label=kind)
    panels[0][0].legend(fontsize=7)
    save_figure(figure, args.output, dpi=110)
    print("wrote", args.output)


if __name__ == "__main__":
    run(main)

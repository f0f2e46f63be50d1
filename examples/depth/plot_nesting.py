#!/usr/bin/env python3
"""Draws accuracy and layers over nesting depth, and prints the table, from the results.json of run.sh.

Lines are means over the seeds. Left, accuracy of all models with the depths that they were trained with; in the middle, layers
that the asked cell gets; right, accuracy of looped models with more depths.
"""

import statistics

from depth import FULL, MORE, ROWS

from fairseq_adaptive.command import run
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.files import read_json
from fairseq_adaptive.ranges import Parser, Range
from fairseq_adaptive.report.pictures import pyplot, require_picture, save_figure


def read_results(path):
    """A file of depth.py: of each model in the order of ROWS the results of its seeds.

    Raises:
        UsageError: when it is none
    """
    found = read_json(path)
    try:
        rows = {name: [row for row in found["runs"] if row["row"] == name] for name in ROWS}
        for row in found["runs"]:
            row["accuracy"][str(ROWS[row["row"]].depths)][1], float(row["multiply_adds"]), int(row["seed"])
        return {name: each for name, each in rows.items() if each}
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path} was not written by examples/depth: {error!r}") from None


def over_depth(rows, depths):
    """Mean accuracies at nesting depths 1, 2 ... of the seeds that were scored with so many depths."""
    return [statistics.fmean(each) for each in zip(*(row["accuracy"][str(depths)][1:] for row in rows))]


def spread(values, digits=1):
    """Mean and, of several, standard deviation."""
    found = f"{statistics.fmean(values):.{digits}f}"
    return found + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def slope(layers):
    """Layers that the asked cell gets more for a nesting depth more, by least squares over nesting depths up to FULL."""
    points = [(int(depth), value) for depth, value in layers["asked"].items() if int(depth) <= FULL]
    return statistics.linear_regression(*zip(*points)).slope if len(points) > 1 else 0.0


def table(found, trained):
    """In Markdown, a line a model and number of depths."""
    lines = [
        "| model | depths | parameters | multiply-adds a sheet | mean layers a cell | accuracy, nesting depths 1 to "
        f"{trained} | deeper ones | asked cell: layers for a depth more | seeds |",
        "|---" * 9 + "|",
    ]
    for name, rows in found.items():
        for depths in rows[0]["accuracy"]:
            own = int(depths) == ROWS[name].depths
            known = [statistics.fmean(row["accuracy"][depths][1 : trained + 1]) for row in rows]
            deeper = [statistics.fmean(row["accuracy"][depths][trained + 1 :] or [0.0]) for row in rows]
            spent = f"{statistics.fmean(row['multiply_adds'] for row in rows) / 1e6:.2f}M" if own else ""
            layers = f"{statistics.fmean(row['mean_depth'] for row in rows):.2f}" if own else ""
            slopes = [slope(row["layers"][depths]) for row in rows if depths in row.get("layers", ())]
            values = [f"`{name}`", depths, f"{rows[0]['parameters']:,}", spent, layers, spread(known), spread(deeper)]
            lines.append(f"| {' | '.join([*values, spread(slopes, 2) if slopes else '', str(len(rows))])} |")
    return "\n".join(lines)


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("results", help="of run.sh")
    parser.add_argument(
        "--trained", type=Range(int, 1, 1_000), default=6, metavar="D", help="deepest of train (default: 6)"
    )
    parser.add_argument("--output", required=True, metavar="PNG", help="the picture; must not exist")
    args = parser.parse_args()
    require_picture(args.output)
    found, plt = read_results(args.results), pyplot()
    print(table(found, args.trained))
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
    for number, (name, rows) in enumerate(found.items()):
        colour, title = f"C{number}", ROWS[name].title
        accuracy = over_depth(rows, ROWS[name].depths)
        left.plot(range(1, len(accuracy) + 1), accuracy, marker=".", color=colour, label=title)
        for depths, style in ((ROWS[name].depths, "-"), (MORE[0], "--")):
            if str(depths) in rows[0].get("layers", ()):
                asked = [row["layers"][str(depths)]["asked"] for row in rows]
                means = {int(depth): statistics.fmean(each[depth] for each in asked) for depth in asked[0]}
                middle.plot(
                    [*means], [*means.values()], style, marker=".", color=colour, label=f"{title}, {depths} depths"
                )
        for depths, style in zip(MORE, ("-", "--")):
            if str(depths) in rows[0]["accuracy"]:
                accuracy = over_depth(rows, depths)
                label = f"{title}, {depths} depths"
                right.plot(range(1, len(accuracy) + 1), accuracy, style, marker=".", color=colour, label=label)
    left.set(title="as trained", ylabel="accuracy, %", ylim=(0, 103))
    middle.set(title="layers of the asked cell", ylabel="layers", ylim=(0, MORE[0] + 0.5))
    right.set(title="with more depths than in training", ylabel="accuracy, %", ylim=(0, 103))
    for panel in (left, middle, right):
        panel.axvline(args.trained + 0.5, color="k", linewidth=0.7, linestyle=":")
        panel.set_xlabel("nesting depth (left of the dotted line: in training)")
        panel.grid(alpha=0.25)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize=7)
    save_figure(figure, args.output, dpi=110)
    print("wrote", args.output)


if __name__ == "__main__":
    run(main)

#!/usr/bin/env python3
"""Draws accuracy and layers over nesting depth, and prints the table, from files that run.sh has written, results.json.

Lines are means over the seeds. Left, accuracy of all models with the depths that they were trained with; in the middle, layers
of the cells that are not asked for, by the nesting depth of each; right, accuracy of looped models with more depths. @0.98:
halting at that quantile.
"""

import statistics

from depth import FULL, MORE, QUANTILES, ROWS

from fairseq_adaptive.command import run
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.files import read_json
from fairseq_adaptive.ranges import Parser, Range
from fairseq_adaptive.report.pictures import pyplot, require_picture, save_figure

COLOURS = [*(f"C{number}" for number in range(10)), "k"]  # of the models


def read_results(*paths):
    """Files of depth.py: of each model in the order of ROWS the results of its seeds.

    Raises:
        UsageError: when one is none, or a training is in two of them
    """
    rows, where = {name: {} for name in ROWS}, {}
    for path in paths:
        try:
            for row in read_json(path)["runs"]:
                name, seed = row["row"], int(row["seed"])
                row["accuracy"][str(ROWS[name].depths)][1], float(row["multiply_adds"])
                if seed in rows[name]:
                    raise UsageError(f"{name} of seed {seed} is in {where[name, seed]} and in {path}: name one of them")
                rows[name][seed], where[name, seed] = row, path
        except (IndexError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(f"{path} was not written by examples/depth: {error!r}") from None
    return {name: [each[seed] for seed in sorted(each)] for name, each in rows.items() if each}


def over_depth(rows, kind, setting):
    """Means over the seeds of ``accuracy`` or ``depth`` at nesting depths 1, 2 ..., scored in one way."""
    return [statistics.fmean(each) for each in zip(*(row[kind][setting][1:] for row in rows))]


def spread(values, digits=1):
    """Mean and, of several, standard deviation."""
    found = f"{statistics.fmean(values):.{digits}f}"
    return found + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def table(found, trained):
    """In Markdown, a line a model and setting: accuracies at nesting depths of train and at deeper ones, and layers of all cells
    and of the asked one at nesting depths 1 and ``trained``."""
    titles = ["model", "depths", "parameters", f"accuracy, depths 1 to {trained}", "deeper ones", "layers of all cells"]
    titles += [f"at depth 1, {trained}", "of the asked cell", "seeds"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name, rows in found.items():
        for setting in rows[0]["accuracy"]:
            known = [statistics.fmean(row["accuracy"][setting][1 : trained + 1]) for row in rows]
            deeper = [statistics.fmean(row["accuracy"][setting][trained + 1 :] or [0.0]) for row in rows]
            values = [f"`{name}`", setting, f"{rows[0]['parameters']:,}", spread(known), spread(deeper)]
            if "depth" in rows[0]:
                means = over_depth(rows, "depth", setting)
                values += [f"{statistics.fmean(means[:trained]):.2f}", f"{means[0]:.2f}, {means[trained - 1]:.2f}"]
            else:
                values += [setting if "layers" not in rows[0] else "", ""]
            layers = [row["layers"][setting] for row in rows if setting in row.get("layers", ())]
            asked = (
                [statistics.fmean(each["asked"][str(depth)] for each in layers) for depth in (1, trained)]
                if layers
                else []
            )
            values += [", ".join(f"{each:.2f}" for each in asked), str(len(rows))]
            lines.append(f"| {' | '.join(values)} |")
    return "\n".join(lines)


def draw(panels, found, trained):
    """Lines of all models."""
    left, middle, right = panels
    for number, (name, rows) in enumerate(found.items()):
        colour, title, own = COLOURS[number], ROWS[name].title, str(ROWS[name].depths)
        late = f"@{QUANTILES[-1]}"
        for setting, style in ((own, "-"), (own + late, "--")):
            if setting in rows[0]["accuracy"]:
                line(left, over_depth(rows, "accuracy", setting), style, colour, title + setting.removeprefix(own))
            if setting in rows[0].get("layers", ()):
                cells = [row["layers"][setting]["cells"] for row in rows]
                means = [statistics.fmean(each[str(depth)] for each in cells) for depth in range(1, trained + 1)]
                line(middle, means, style, colour, title + setting.removeprefix(own))
        for setting, style in ((str(MORE[0]), "-"), (str(MORE[0]) + late, "--"), (str(MORE[1]), ":")):
            if setting in rows[0]["accuracy"] and (style != ":" or name == "universal"):
                line(right, over_depth(rows, "accuracy", setting), style, colour, f"{title}, {setting} depths")


def line(panel, values, style, colour, label):
    panel.plot(range(1, len(values) + 1), values, style, marker=".", color=colour, label=label)


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("results", nargs="+", help="of run.sh")
    parser.add_argument(
        "--trained", type=Range(int, 1, 1_000), default=6, metavar="D", help="deepest of train (default: 6)"
    )
    parser.add_argument("--output", required=True, metavar="PNG", help="the picture; must not exist")
    args = parser.parse_args()
    require_picture(args.output)
    found, plt = read_results(*args.results), pyplot()
    tested = min(len(each) - 1 for rows in found.values() for row in rows for each in row["accuracy"].values())
    trained = min(args.trained, tested)
    print(table(found, trained))
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 5.6), layout="constrained")
    draw((left, middle, right), found, trained)
    left.set(title="as trained", ylabel="accuracy, %", ylim=(0, 103))
    middle.set(title="layers of cells not asked for", ylabel="layers", ylim=(0, FULL + 0.3))
    right.set(title="with more depths than in training", ylabel="accuracy, %", ylim=(0, 103))
    for panel in (left, middle, right):
        panel.axvline(trained + 0.5, color="k", linewidth=0.7, linestyle=":")
        panel.set_xlabel("nesting depth (left of the dotted line: in training)")
        panel.grid(alpha=0.25)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False)
    save_figure(figure, args.output, dpi=110)
    print("wrote", args.output)


if __name__ == "__main__":
    run(main)

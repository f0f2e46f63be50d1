#!/usr/bin/env python3
"""Draws accuracy over measured speed-up from the JSON files of scripts/benchmark/classification.py, a panel each."""

from fairseq_adaptive.command import run
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.files import read_json
from fairseq_adaptive.ranges import Parser
from fairseq_adaptive.report.pictures import pyplot, require_picture, save_figure


def read(path):
    """The models of a file, the dense one first."""
    try:
        models = read_json(path)["models"]
        for model in models:
            float(model["accuracy"]), float(model["flops_speedup"]), model["name"], model["speed"], model["accuracies"]
        models[0]
    except (IndexError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{path} was not written by scripts/benchmark/classification.py --output: {error!r}") from None
    return models


def draw(axes, title, models, size):
    speedups = [model["speed"][size]["against_dense"] if number else 1.0 for number, model in enumerate(models)]
    accuracies = [model["accuracy"] for model in models]
    axes.axhspan(accuracies[0] - 1, accuracies[0], color="0.92", label="at most 1 point lost")
    axes.plot(speedups, accuracies, color="C0", marker="o", label="measured time")
    flops = [model["flops_speedup"] for model in models]
    axes.plot(flops, accuracies, color="C1", marker=".", linestyle=":", label="FLOPs")
    for model, speedup in zip(models, speedups):
        place = {"textcoords": "offset points", "xytext": (4, 4), "fontsize": 7}
        axes.annotate(model["name"], (speedup, model["accuracy"]), **place)
        for accuracy in model["accuracies"]:
            axes.plot(speedup, accuracy, color="C0", marker="_", alpha=0.5)
    axes.set(title=title, xlabel=f"times as fast as dense (batch {size})", ylabel="accuracy, %")
    axes.legend(fontsize=7, loc="lower left")


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("results", nargs="+", metavar="TITLE=JSON")
    parser.add_argument("--batch-size", default="32", metavar="N", help="whose times are drawn (default: %(default)s)")
    parser.add_argument("--output", required=True, metavar="PNG", help="the picture; must not exist")
    args = parser.parse_args()
    require_picture(args.output)
    titles, paths = zip(*(result.rpartition("=")[::2] for result in args.results))
    results = [read(path) for path in paths]
    lacking = next((path for path, models in zip(paths, results) if args.batch_size not in models[0]["speed"]), None)
    if lacking is not None:
        raise UsageError(f"{lacking} has no times of batches of {args.batch_size}: choose another --batch-size")
    plt = pyplot()
    figure, panels = plt.subplots(1, len(results), figsize=(4.6 * len(results), 3.4), squeeze=False)
    for panel in zip(panels[0], titles, results):
        draw(*panel, args.batch_size)
    figure.tight_layout()
    save_figure(figure, args.output, dpi=110)
    print("wrote", args.output)


if __name__ == "__main__":
    run(main)

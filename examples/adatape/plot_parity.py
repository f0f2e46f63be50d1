#!/usr/bin/env python3
"""Draws the accuracy of train-parity.sh over epochs and over lengths, from its logs, and prints the table."""

import itertools
import logging
import re
from collections import defaultdict
from pathlib import Path

from fairseq_adaptive.command import run
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.ranges import Parser
from fairseq_adaptive.report.pictures import pyplot, require_picture, save_figure
from fairseq_adaptive.report.shading import ramp, shares

VALID = re.compile(r"epoch (\d+) \| valid on 'valid' subset .*?\| accuracy ([\d.]+)(?:.*?\| tape_len ([\d.]+))?")
NAME = re.compile(r".+-\d{1,9}-\d{1,9}")
SECONDS = re.compile(r"done training in ([\d.]+) seconds")


def main():
    logging.getLogger().setLevel(logging.WARNING)  # importing fairseq sets DEBUG, and matplotlib lists every font
    parser = Parser(description=__doc__)
    parser.add_argument("folder", type=Path, help="with MODEL-LENGTH-SEED/train.log")
    parser.add_argument("--output", required=True, metavar="PNG", help="the picture; must not exist")
    args = parser.parse_args()
    require_picture(args.output)

    runs = defaultdict(dict)  # (model, length) -> seed -> accuracies
    print("| model | length | seed | accuracy after each epoch | tape | seconds |\n|---|---|---|---|---|---|")
    for log in sorted((log for log in args.folder.glob("*/train.log") if NAME.fullmatch(log.parent.name)), key=_key):
        model, length, seed = _key(log)
        text = log.read_text(encoding="utf-8", errors="replace")
        valid = VALID.findall(text)
        if not valid:
            continue
        runs[model, length][seed] = [float(accuracy) for _, accuracy, _ in valid]
        seconds = SECONDS.search(text)
        shown = ", ".join(f"{accuracy:.2f}" for accuracy in runs[model, length][seed])
        ended = seconds[1] if seconds else "not finished"
        print(f"| {model} | {length} | {seed} | {shown} | {valid[-1][2]} | {ended} |")
    if not runs:
        raise UsageError(f"{args.folder} holds no MODEL-LENGTH-SEED/train.log with an epoch: run train-parity.sh first")
    _plot(runs, args.output)
    print("wrote", args.output)


def _key(log):
    model, length, seed = log.parent.name.rsplit("-", 2)
    return model, int(length), int(seed)


def _plot(runs, path):
    save_figure(figure_of(runs), path, dpi=120)


def figure_of(runs):
    """Accuracies of ``(model, length) -> seed -> accuracies``: the length is the colour, the model the line."""
    plt = pyplot()
    from matplotlib.lines import Line2D

    figure, (over_epochs, over_lengths) = plt.subplots(1, 2, figsize=(11, 3.8), sharey=True, layout="constrained")
    lengths, models = (sorted({each[place] for each in runs}) for place in (1, 0))
    colours = {length: ramp(0.15 + 0.85 * share) for length, share in zip(lengths, shares(len(lengths)))}
    strokes = dict(zip(models, itertools.cycle(("-", "--", ":", "-."))))
    last = defaultdict(dict)
    for (model, length), seeds in sorted(runs.items()):
        for accuracies in seeds.values():
            over_epochs.plot(
                range(1, len(accuracies) + 1), accuracies, strokes[model], color=colours[length], marker="."
            )
        last[model][length] = [accuracies[-1] for accuracies in seeds.values()]
    for model, found in last.items():
        means = [sum(values) / len(values) for values in found.values()]
        over_lengths.plot(list(found), means, strokes[model], color="0.5", zorder=1)
        for length, values in found.items():
            over_lengths.scatter([length] * len(values), values, color=colours[length], zorder=2)
    over_epochs.set(xlabel="epoch (64,000 sequences)", ylabel="accuracy, %", title="every run")
    over_lengths.set(xlabel="length", title="last epoch: seeds, and their mean", xticks=lengths)
    for axis in (over_epochs, over_lengths):
        axis.axhline(50, color="0.8", linewidth=0.8, zorder=0)
    keys = [Line2D([], [], color=colours[length], linewidth=4, label=f"length {length}") for length in lengths]
    keys += [Line2D([], [], color="0.5", linestyle=strokes[model], label=model) for model in models]
    figure.legend(handles=keys, loc="outside right center", frameon=False)
    return figure


if __name__ == "__main__":
    run(main)

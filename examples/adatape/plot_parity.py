#!/usr/bin/env python3
"""Draws the accuracy of train-parity.sh over epochs and over lengths, from its logs, and prints the table."""

import logging
import re
from collections import defaultdict
from pathlib import Path

from fairseq_adaptive.command import run
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.ranges import Parser
from fairseq_adaptive.report.pictures import pyplot, require_picture, save_figure

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
    plt = pyplot()
    figure, (over_epochs, over_lengths) = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True)
    last = defaultdict(lambda: defaultdict(list))
    for place, ((model, length), seeds) in enumerate(sorted(runs.items())):
        for number, accuracies in enumerate(seeds.values()):
            over_epochs.plot(
                range(1, len(accuracies) + 1),
                accuracies,
                marker=".",
                color=f"C{place % 10}",
                label=None if number else f"{model}, {length}",
            )
            last[model][length].append(accuracies[-1])
    for model, lengths in last.items():
        means = [sum(values) / len(values) for values in lengths.values()]
        (line,) = over_lengths.plot(list(lengths), means, label=model)
        for length, values in lengths.items():
            over_lengths.plot([length] * len(values), values, ".", color=line.get_color())
    over_epochs.set(xlabel="epoch (64,000 sequences)", ylabel="accuracy", title="parity: every run")
    ticks = sorted({length for _, length in runs})
    over_lengths.set(xlabel="length", title="parity: last epoch, mean over seeds", xticks=ticks)
    for axis in (over_epochs, over_lengths):
        axis.axhline(50, color="grey", linewidth=0.5)
        axis.legend(fontsize=7)
    save_figure(figure, path, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    run(main)

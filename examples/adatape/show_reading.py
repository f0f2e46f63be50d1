#!/usr/bin/env python3
"""Shows what an adatape_parity reads, token by token, in order; and whether that gives the parity away."""

import logging
from collections import Counter

import torch

import fairseq_adaptive.plugin  # noqa: F401  registers task and model
from fairseq_adaptive.command import run
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.interop.checkpoint import load_model
from fairseq_adaptive.ranges import COUNT, Parser


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("path", help="a checkpoint of train-parity.sh adatape")
    parser.add_argument("--sequences", type=COUNT, default=2000, help="how many of the validation set (default 2000)")
    args = parser.parse_args()

    logging.getLogger().setLevel(logging.WARNING)
    model, task = load_model(args.path)
    if getattr(model, "tape", None) is None:
        raise UsageError(f"{args.path} has no tape: train it with train-parity.sh adatape")
    task.load_dataset("valid")
    dataset = task.dataset("valid")
    batch = dataset.collater([dataset[index] for index in range(min(args.sequences, len(dataset)))])
    with torch.no_grad():
        logits, extra = model.eval()(**batch["net_input"])
    elements, target = batch["net_input"]["elements"] - 1, batch["target"]
    tapes = [
        [[int(row[entry]) for entry in token if entry >= 0] for token in tape if max(token) >= 0]
        for row, tape in zip(elements, extra["tape"].entries.tolist())
    ]
    for tape in tapes[:3]:
        print(" | ".join(" ".join(map(str, token)) for token in tape))
    orders = Counter(" ".join(map(str, dict.fromkeys(sum(tape, [])))) for tape in tapes)
    print(
        f"{len(tapes)} sequences, {100 * (logits.argmax(1) == target).float().mean():.2f}% right; orders of reading:",
        ", ".join(f"{order} ({count})" for order, count in orders.most_common(3)),
    )
    odd = [sum(token.count(1) % 2 for token in tape if len(set(token)) > 1) % 2 for tape in tapes]
    agree = sum(int(o == t) for o, t in zip(odd, target.tolist()))
    print(f"in {agree} the label is whether an odd number of tokens mixes an odd number of ones with something else")


if __name__ == "__main__":
    run(main)

#!/usr/bin/env python3
"""How many layers each cell of a sheet gets from a model in which tokens halt, by its nesting depth."""

import statistics
import sys
from pathlib import Path

from sheets import depths

sys.path.insert(1, str(Path(__file__).parents[1]))  # of the examples
from steps import write_json  # noqa: E402

from fairseq_adaptive.command import run  # noqa: E402
from fairseq_adaptive.errors import UsageError  # noqa: E402
from fairseq_adaptive.files import read_lines, require_new  # noqa: E402
from fairseq_adaptive.ranges import BATCH, LAYERS, POSITIVE_SHARE, Parser, Range  # noqa: E402


def table(texts, predictions):
    """Layers over nesting depth.

    Args:
        texts: sheets
        predictions: of each, with ``updates``, a number a token

    Returns:
        means by nesting depth: ``asked``, of the asked cell, ``cells``, of all others; and ``all``, of all tokens
    """
    found = {"asked": {}, "cells": {}}
    for text, said in zip(texts, predictions):
        for place, (depth, layers) in enumerate(zip(depths(text.split()), said.updates)):
            found["cells" if place else "asked"].setdefault(depth, []).append(layers)
    means = {
        kind: {depth: round(statistics.fmean(each), 3) for depth, each in sorted(of.items())}
        for kind, of in found.items()
    }
    means["all"] = round(statistics.fmean(layers for said in predictions for layers in said.updates), 3)
    return means


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("checkpoint", help="of depth.py")
    parser.add_argument("data", type=Path, help="the OUT folder of prepare.sh")
    parser.add_argument(
        "--texts", type=Range(int, 1, 10_000_000), default=200, metavar="N", help="sheets a depth (default: 200)"
    )
    parser.add_argument("--depths", type=LAYERS, metavar="N", help="run so many instead of those it was trained with")
    parser.add_argument(
        "--quantile", type=POSITIVE_SHARE, metavar="Q", help="halt at this quantile (default: the rule's own)"
    )
    parser.add_argument("--batch-size", type=BATCH, default=64, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--output", required=True, metavar="JSON", help="what is found; must not exist")
    args = parser.parse_args()
    require_new(args.output)
    files = sorted(args.data.glob("text/depth-*.input0"), key=lambda path: int(path.stem.partition("-")[2]))
    if not files:
        raise UsageError(f"there is no text/depth-1.input0 in {args.data}: make it with examples/depth/prepare.sh")

    import fairseq_adaptive.plugin  # noqa: F401
    from fairseq_adaptive.hub.classifier import TranskimmerClassifier
    from fairseq_adaptive.interop.checkpoint import load_trained

    changed = {"data": str(args.data / "bin"), "encoder_layers": args.depths, "exit_quantile": args.quantile}
    model, _, task = load_trained(args.checkpoint, {name: each for name, each in changed.items() if each is not None})
    classifier = TranskimmerClassifier(model, task, None)
    texts = [line for path in files for line in read_lines(path)[: args.texts]]
    found = table(texts, classifier.predict(texts, args.batch_size))
    write_json(args.output, found)
    print(" ".join(f"{depth}:{layers}" for depth, layers in found["asked"].items()))


if __name__ == "__main__":
    run(main)

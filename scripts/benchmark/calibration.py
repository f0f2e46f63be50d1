#!/usr/bin/env python3
"""How often a calibrated threshold keeps what it promises: half of the examples calibrate, the others show what is lost.

Every value of the grid is measured once, on all examples. Then, again and again, examples are drawn without replacement: on one
half the threshold is chosen as ``fairseq-adaptive calibrate`` chooses it, on the other its mean loss is compared with the
tolerance.
"""

import argparse
import random

from common import describe

import fairseq_adaptive.plugin  # noqa: F401  registers tasks and models
from fairseq_adaptive.command import run
from fairseq_adaptive.commands.calibrate import GRID, KNOBS, LOSSES, grid, overrides
from fairseq_adaptive.ranges import BATCH, COUNT, RATE, Parser
from fairseq_adaptive.report.early_exit import EarlyExits, losses
from fairseq_adaptive.report.risk import fixed_sequence


def measure(args, subset):
    """Of one subset the losses of its examples and the mean depth, for each value."""
    exits = EarlyExits(
        args.checkpoint,
        args.data,
        subset,
        args.knob,
        args.loss,
        args.batch_size,
        args.model_overrides,
        args.beam,
        args.post_process,
    )
    exits.full_depth()
    full, found = exits.run(), {}
    for value in args.grid:
        exits.turn(value)
        early = exits.run()
        found[value] = losses(args.loss, full.scores, early.scores), early.depth, early.macs / full.macs
    return found


def resample(found, args, generator):
    """The value that one half chooses, and its mean loss on the other; None and 0 where none is kept."""
    count = len(next(iter(found.values()))[0])
    order = generator.sample(range(count), count)
    ours, others = order[: count // 2], order[count // 2 :]
    tested = fixed_sequence(
        args.grid, lambda value: [found[value][0][each] for each in ours], args.tolerance, args.confidence
    )
    kept = [each.value for each in tested if each.kept]
    if not kept:
        return None, 0.0
    value = min(kept, key=lambda each: found[each][1])
    return value, sum(found[value][0][each] for each in others) / len(others)


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--data", metavar="FOLDER", help="as of the training where it is not given")
    parser.add_argument("--subsets", default="valid,test", help="whose examples are put together")
    parser.add_argument("--knob", choices=KNOBS, default=KNOBS[0])
    parser.add_argument("--loss", choices=LOSSES, required=True)
    parser.add_argument("--tolerance", type=RATE, default=0.02, metavar="X")
    parser.add_argument("--confidence", type=RATE, default=0.95, metavar="X")
    parser.add_argument("--grid", type=grid, default=list(GRID), metavar="X,X,...")
    parser.add_argument("--resamples", type=COUNT, default=100, metavar="N")
    parser.add_argument("--batch-size", type=BATCH, default=32, metavar="N")
    parser.add_argument("--model-overrides", type=overrides, default={}, metavar="DICT")
    parser.add_argument("--beam", type=COUNT, default=1, metavar="N")
    parser.add_argument("--post-process", metavar="NAME")
    args = parser.parse_args()
    describe(args)

    parts = [measure(args, subset) for subset in args.subsets.split(",")]
    sizes, found = [len(next(iter(part.values()))[0]) for part in parts], {}
    for value in args.grid:
        together = sum((part[value][0] for part in parts), [])
        depth, share = (sum(n * part[value][at] for n, part in zip(sizes, parts)) / sum(sizes) for at in (1, 2))
        found[value] = together, depth, share
        print(f"{value:>8g} depth {depth:.3f} multiply-adds {share:.1%} loss {sum(together) / len(together):.5f}")
    generator = random.Random(1)
    every = [resample(found, args, generator) for _ in range(args.resamples)]
    within = sum(loss <= args.tolerance for _, loss in every)
    chosen = sorted({value for value, _ in every if value is not None})
    counts = ", ".join(f"{value:g}: {sum(each == value for each, _ in every)}" for value in chosen)
    print(
        f"{within} of {args.resamples} resamples lose at most {args.tolerance:g} on the other half "
        f"({sum(sizes) // 2:,} examples calibrate; chosen {counts or 'none'}; none in {sum(v is None for v, _ in every)})"
    )


if __name__ == "__main__":
    run(main)

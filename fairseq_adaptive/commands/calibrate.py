"""Finds the cheapest halting threshold, or exit quantile, whose loss against full depth is within a tolerance.

With a guarantee: with the confidence, over draws of the examples, the expected loss of the value found is at most the
tolerance (CALM, Schuster et al., 2022; Learn then Test, Angelopoulos et al., 2021). The examples must be drawn as those
are that the model will meet, independently of each other, and the model must not have seen them in training.
"""

import argparse
import ast
import json
import logging
import os

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.files import require_new, whole_file
from fairseq_adaptive.progress import say
from fairseq_adaptive.ranges import BATCH, POSITIVE_SHARE, RATE, Parser, Range

KNOBS = ("halting-threshold", "exit-quantile")
LOSSES = ("accuracy", "disagreement", "nll", "bleu", "chrf")
GRID = (0.999, 0.99, 0.98, *(round(0.95 - 0.05 * step, 2) for step in range(19)))


def grid(text):
    """Values, the most careful first."""
    return sorted({POSITIVE_SHARE(each) for each in text.split(",")}, reverse=True)


def overrides(text):
    """The dict that a ``--model-overrides`` of fairseq is."""
    try:
        found = ast.literal_eval(text)
        assert isinstance(found, dict) and all(isinstance(each, str) for each in found)
        return found
    except (AssertionError, SyntaxError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text!r:.60} is no dict of flags: write \"{{'halting': 'act'}}\"") from error


def main(argv=None, prog=None):
    parser = Parser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="of a model in which tokens halt, or with --model-overrides may")
    parser.add_argument("--data", metavar="FOLDER", help="the binarised data (default: as in training)")
    parser.add_argument("--subset", default="valid", help="which split (default: %(default)s)")
    parser.add_argument("--knob", choices=KNOBS, default=KNOBS[0], help="what is turned (default: %(default)s)")
    parser.add_argument(
        "--loss",
        choices=LOSSES,
        required=True,
        help="of an example, 0 to 1. accuracy: full depth was right and the early exit is not; disagreement: they say "
        "different classes; nll: how much more nats a target token costs, in the mean over the example, at most 1; bleu, "
        "chrf: how much lower the score of its translation is, divided by 100",
    )
    parser.add_argument(
        "--tolerance", type=RATE, default=0.02, metavar="X", help="of the expected loss (default: %(default)s)"
    )
    parser.add_argument(
        "--confidence", type=RATE, default=0.95, metavar="X", help="of the guarantee (default: %(default)s)"
    )
    parser.add_argument(
        "--grid",
        type=grid,
        metavar="X,X,...",
        help="values to test, from the greatest down to the first that fails (default: 0.999, 0.99, 0.98, 0.95, 0.9 ... 0.05)",
    )
    parser.add_argument("--batch-size", type=BATCH, default=32, metavar="N", help="examples at a time (default: 32)")
    parser.add_argument(
        "--model-overrides",
        type=overrides,
        default={},
        metavar="DICT",
        help="flags of the model in place of those of the training, as in fairseq-generate: \"{'halting': 'saturation'}\"",
    )
    parser.add_argument("--beam", type=Range(int, 1, 1000), default=5, metavar="N", help="of a search (default: 5)")
    parser.add_argument(
        "--post-process", metavar="NAME", help="how the subwords of translations are joined: subword_nmt, sentencepiece"
    )
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU")
    parser.add_argument("--output", metavar="JSON", help="write all of it to this file; must not exist")
    args = parser.parse_args(argv)

    import torch

    import fairseq_adaptive.plugin  # noqa: F401  registers tasks and models
    from fairseq_adaptive.report.early_exit import EarlyExits, losses
    from fairseq_adaptive.report.risk import examples_needed, fixed_sequence

    logging.disable(logging.INFO)
    if args.output:
        require_new(args.output)
    exits = EarlyExits(
        args.checkpoint,
        args.data,
        args.subset,
        args.knob,
        args.loss,
        args.batch_size,
        args.model_overrides,
        args.beam,
        args.post_process,
        "cuda" if torch.cuda.is_available() and not args.cpu else "cpu",
    )
    needed = examples_needed(args.tolerance, args.confidence)
    if exits.examples < needed:
        raise UsageError(
            f"{args.subset} has {exits.examples:,} examples, and a tolerance of {args.tolerance:g} with confidence "
            f"{args.confidence:g} needs {needed:,} at least, even if none lost anything: use more, or ask for less"
        )
    values = args.grid
    if values is None:
        # a rule that halts in training is never deeper than it was trained to be
        most = min([1.0, *(each.threshold for each in exits.rules if each.halts_in_training)])
        values = [each for each in GRID if each <= most]
    exits.full_depth()
    full = exits.run()
    costs = {}

    def losses_of(value):
        exits.turn(value)
        early = exits.run()
        costs[value] = early
        return losses(args.loss, full.scores, early.scores)

    print(f"{exits.examples:,} examples; full depth: {full.depth:.3f} updates of a token")
    print(f"{args.knob:>17} {'depth':>8} {'multiply-adds':>14} {'loss':>9} {'p-value':>9}")
    rows = []
    for each in fixed_sequence(values, losses_of, args.tolerance, args.confidence):
        early = costs[each.value]
        share = early.macs / full.macs if early.macs and full.macs else None
        spent = "" if share is None else f"{share:.1%}"
        kept = "kept" if each.kept else "not kept"
        say(f"{each.value:>17g} {early.depth:>8.3f} {spent:>14} {each.loss:>9.5f} {each.p:>9.2e} {kept}")
        rows.append({**each._asdict(), "depth": early.depth, "share": share})
    # all that are kept are within the tolerance at once; of equal costs the most careful
    chosen = min((each for each in rows if each["kept"]), key=lambda each: each["depth"], default={}).get("value")
    said = {} if chosen is None else {**args.model_overrides, **exits.overrides(chosen)}
    if chosen is None:
        print("no value of the grid is within the tolerance with this confidence: keep full depth, or ask for less")
    else:
        print(
            f"{args.knob} {chosen:g}: the expected loss ({args.loss}) is at most {args.tolerance:g} with confidence "
            f'{args.confidence:g}\n--model-overrides "{said}"'
        )
    if args.output:
        report = {
            "checkpoint": os.fspath(args.checkpoint),
            "subset": args.subset,
            "examples": exits.examples,
            **{name: getattr(args, name) for name in ("knob", "loss", "tolerance", "confidence")},
            "full_depth": full.depth,
            "tested": rows,
            "chosen": chosen,
            "model_overrides": said,
        }
        with whole_file(args.output) as part, open(part, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)
            file.write("\n")
        print("wrote", args.output)

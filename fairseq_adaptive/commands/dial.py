"""Turns a trained model to a share of its counterpart's multiply-adds, and writes it as a new checkpoint.

The thresholds or capacities of routers are moved, in a model without a router the thresholds of its halting rules, else that
of a tape; the share is the one that fairseq-adaptive report shows, of the whole model, on held-out text. Trainings get near
by --criterion adaptive_compute_loss --compute 0.5.
"""

import argparse
import logging
import warnings

from fairseq_adaptive.files import require_new
from fairseq_adaptive.ranges import BATCH, COUNT, POSITIVE, Parser


def main(argv=None, prog=None):
    parser = Parser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="of a model with a router, a halting rule or a tape")
    parser.add_argument(
        "--compute",
        type=POSITIVE,
        required=True,
        metavar="X",
        help="share of the counterpart's multiply-adds; above 1 where a tape adds to them",
    )
    parser.add_argument("--output", required=True, metavar="FILE", help="the new checkpoint; must not exist")
    parser.add_argument("--data", metavar="FOLDER", help="the binarised data (default: as in training)")
    parser.add_argument("--subset", default="valid", help="which split it is measured on (default: %(default)s)")
    parser.add_argument("--batch-size", type=BATCH, default=8, metavar="N", help="texts at a time (default: 8)")
    parser.add_argument("--texts", type=COUNT, default=256, metavar="N", help="how many of them (default: 256)")
    args = parser.parse_args(argv)

    import fairseq_adaptive.plugin  # noqa: F401  registers tasks and models
    from fairseq_adaptive.report.dial import turn_to, write_dialled
    from fairseq_adaptive.report.evaluated import Evaluated

    logging.disable(logging.INFO)
    warnings.filterwarnings("ignore", message="'pin_memory' argument is set")
    require_new(args.output)
    evaluated = Evaluated(args.checkpoint, args.data, args.subset, args.batch_size, args.texts)
    found = turn_to(evaluated, args.compute)
    changed = write_dialled(args.checkpoint, args.output, found, evaluated.model)
    least, most = found.reach
    print(f"{', '.join(found.policies)}: {least:.3f} to {most:.3f} of the counterpart's multiply-adds")
    print(f"{found.share:.4f} on {evaluated.texts} texts of {args.subset}")
    if changed:
        print("--model-overrides", '"' + str(changed).replace('"', '\\"') + '"')
    print("wrote", args.output)

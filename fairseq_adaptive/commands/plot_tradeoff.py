"""Draws the quality of models over the time that they were measured to take, from reports of fairseq-adaptive report."""

import logging
import os

from fairseq_adaptive.ranges import Parser

COSTS = ("time", "multiply-adds", "memory")


def main(argv=None, prog=None):
    parser = Parser(prog=prog, description=__doc__)
    parser.add_argument(
        "reports",
        nargs="+",
        metavar="[TITLE=]JSON",
        help="of fairseq-adaptive report --json, each a line of its own; all measured on the same data, in the same way",
    )
    parser.add_argument("--output", required=True, metavar="PNG", help="the picture; must not exist")
    parser.add_argument("--over", choices=COSTS, default="time", help="what is on the other axis (default: time)")
    parser.add_argument(
        "--quality",
        metavar="NAME",
        help="a value that the reports have, such as accuracy, bleu or ppl (default: the first of the usual ones)",
    )
    args = parser.parse_args(argv)

    from fairseq_adaptive.printable import printable
    from fairseq_adaptive.report.pictures import require_picture
    from fairseq_adaptive.report.tradeoff import plot_tradeoff, read_report, series

    logging.disable(logging.INFO)
    require_picture(args.output)
    parts = [each.rpartition("=") if not os.path.exists(each) else ("", "", each) for each in args.reports]
    titles = [printable(title or os.path.splitext(os.path.basename(path))[0]) for title, _, path in parts]
    reports = [read_report(path) for _, _, path in parts]
    found = series(reports, args.over, args.quality)
    for title, points in zip(titles, found["points"]):
        for point in points:
            print(f"{title}\t{point.name}\t{args.over} {point.cost:.4g}\t{found['quality']} {point.quality:g}")
    plot_tradeoff(reports, titles, args.output, args.over, args.quality)
    print("wrote", args.output)

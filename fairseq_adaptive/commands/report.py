"""Shows what checkpoints spend, where, and how good they are, side by side: parameters, multiply-adds by part and by
depth, tokens kept and halted, time, memory, and the metrics of the task.

Reads any checkpoint of fairseq. A model with policies is compared with its counterpart: the same weights, its policies
off.
"""

import json
import logging

from fairseq_adaptive.command import device
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.files import require_new, whole_file
from fairseq_adaptive.ranges import BATCH, COUNT, ROUNDS, Parser


def main(argv=None, prog=None):
    parser = Parser(prog=prog, description=__doc__)
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="of one task")
    parser.add_argument("--data", metavar="FOLDER", help="of the task (default: that of the training)")
    parser.add_argument("--subset", default="valid", metavar="NAME", help="of the data (default: valid)")
    parser.add_argument("--batch-size", type=BATCH, default=8, metavar="N", help="texts a batch (default: 8)")
    parser.add_argument(
        "--texts",
        type=COUNT,
        default=256,
        metavar="N",
        help="measure costs and times on about so many texts: sentences, segments or images (default: 256)",
    )
    parser.add_argument(
        "--rounds", type=ROUNDS, default=5, metavar="N", help="how often all are timed in turn (default: 5)"
    )
    parser.add_argument(
        "--quality",
        default=True,
        action="store_true",
        help="evaluate the whole subset by the saved criterion (default)",
    )
    parser.add_argument("--no-quality", dest="quality", action="store_false", help="leave that out")
    parser.add_argument("--device", type=device, help="where to measure (default: cuda where there is one, else cpu)")
    parser.add_argument("--json", metavar="FILE", help="write all numbers; must not exist")
    parser.add_argument("--html", metavar="FILE", help="write a page with tables and bars; must not exist")
    args = parser.parse_args(argv)

    import torch

    import fairseq_adaptive.plugin  # noqa: F401  registers tasks, models and criterions
    from fairseq_adaptive.report.compute_page import to_html
    from fairseq_adaptive.report.compute_report import compute_report
    from fairseq_adaptive.report.compute_table import to_text

    logging.disable(logging.INFO)
    for path in filter(None, (args.json, args.html)):
        require_new(path)
    if args.json and args.json == args.html:
        raise UsageError(f"--json and --html are both {args.json}: name two files")
    report = compute_report(
        args.checkpoints,
        args.data,
        args.subset,
        args.batch_size,
        args.texts,
        args.rounds,
        args.quality,
        args.device or ("cuda" if torch.cuda.is_available() else "cpu"),
    )
    print(to_text(report))
    for path, content in ((args.json, json.dumps(report, indent=1) + "\n"), (args.html, to_html(report))):
        if path:
            with whole_file(path) as part, open(part, "w", encoding="utf-8") as file:
                file.write(content)
            print("wrote", path)

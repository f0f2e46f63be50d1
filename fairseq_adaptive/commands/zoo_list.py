"""Shows what a zoo has: name, version, size, task, architecture, parameters and score; with names, all that is known of them."""

import json
from dataclasses import asdict

from fairseq_adaptive.printable import printable
from fairseq_adaptive.ranges import Parser


def main(argv=None, prog=None):
    parser = Parser(prog=prog, description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="show all of these, as JSON (default: a line each of all)"
    )
    parser.add_argument(
        "--zoo",
        metavar="PLACE",
        help="a folder or an address with zoo.json (default: $FAIRSEQ_ADAPTIVE_ZOO, else that of the package)",
    )
    args = parser.parse_args(argv)

    from fairseq_adaptive.hub.zoo import read_zoo

    zoo = read_zoo(args.zoo)
    if args.names:
        print(json.dumps([asdict(zoo.find(name)) for name in args.names], indent=1, ensure_ascii=False))
        return
    if not zoo.entries:
        print(f"{zoo.manifest} lists no model")
    for each in zoo.entries:
        scores = ", ".join(f"{metric} {value:g}" for metric, value in each.score.items())
        facts = (
            each.stem,
            f"{each.bytes / 1e6:.2f} MB",
            each.task,
            each.architecture,
            f"{each.parameters:,} parameters",
        )
        print(printable("  ".join((*facts, each.weights, scores, f"data: {each.data} ({each.licence})"))))

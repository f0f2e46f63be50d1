"""Checks a zoo before it is published: every archive that zoo.json lists is there, has its size and SHA-256, and loads."""

import logging

from fairseq_adaptive.ranges import Parser


def main(argv=None, prog=None):
    parser = Parser(prog=prog, description=__doc__)
    parser.add_argument(
        "--zoo",
        metavar="PLACE",
        help="a folder or an address with zoo.json (default: $FAIRSEQ_ADAPTIVE_ZOO, else that of the package)",
    )
    args = parser.parse_args(argv)

    from fairseq_adaptive.hub.packing import check_all
    from fairseq_adaptive.hub.zoo import read_zoo

    logging.disable(logging.INFO)
    zoo = read_zoo(args.zoo)
    count = 0
    for count, entry in enumerate(check_all(zoo), 1):
        print(f"{entry.file}: as the manifest says, and loads", flush=True)
    print(f"{zoo.manifest}: {count} models")

"""Prints the flags of an architecture, criterion, task or optimizer of this package, which fairseq's --help does not show.

Of each: what it takes, its range, its default and what it does. Without a name, all names.
"""

import difflib
import logging

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.ranges import Parser


def main(argv=None, prog=None):
    parser = Parser(prog=prog, description=__doc__)
    parser.add_argument("name", nargs="?", metavar="NAME", help="as after --arch, --criterion, --task or --optimizer")
    parser.add_argument("--all", action="store_true", help="also the flags that it has from fairseq")
    parser.add_argument("--markdown", action="store_true", help="print the page of all flags, docs/flags.md")
    args = parser.parse_args(argv)
    if args.markdown and (args.name or args.all):
        parser.error("--markdown prints the page of all flags, and goes with nothing else")

    logging.disable(logging.INFO)
    from fairseq_adaptive.report import flags

    if args.markdown:
        print(flags.markdown(), end="")
        return
    known = flags.known()
    found = [each for each in known if each[1] == args.name]
    if args.name and not found:
        near = difflib.get_close_matches(args.name, [each[1] for each in known], 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UsageError(
            f"{args.name} is no architecture, criterion, task or optimizer of this package: {hint}"
            "without a name, this command lists all"
        )
    if not args.name:
        for kind in ("architecture", "criterion", "task", "optimizer"):
            print(f"{kind}: {' '.join(each[1] for each in known if each[0] == kind)}")
    print("\n\n".join(flags.describe(*each, stock=args.all) for each in found), end="\n" if found else "")

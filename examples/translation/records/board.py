#!/usr/bin/env python3
"""Prints the board: the records that have a result.json of measure.py, the fewest core-minutes first.

python examples/translation/records/board.py examples/translation/records/*/
"""

import argparse
import statistics
from pathlib import Path

from fairseq_adaptive.command import run
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.files import read_json
from fairseq_adaptive.ranges import Parser

RESULT = "result.json"
TITLES = "record", "core-minutes, mean (least to most)", "minutes", "BLEU, mean", "least", "machine", "date"


def row(folder):
    """Mean core-minutes, and a line in Markdown.

    Raises:
        UsageError: when the folder has no result, or another file under that name
    """
    path = folder / RESULT
    if not path.is_file():
        raise UsageError(f"{path} is missing: measure.py makes it")
    found = read_json(path)
    try:
        seeds, machine = found["seeds"], found["machine"]
        used, clock, bleu = ([each[name] for each in seeds] for name in ("core_minutes", "minutes", "bleu"))
        where = f"{machine['threads']} of {machine['processors']} cores, {machine['processor']}"
        cells = [f"`{folder.name}`", f"{statistics.fmean(used):.1f} ({min(used):.1f} to {max(used):.1f})"]
        cells += [
            f"{statistics.fmean(clock):.1f}",
            f"{statistics.fmean(bleu):.2f} of {len(bleu)} seeds",
            f"{min(bleu):.2f}",
        ]
        return statistics.fmean(used), f"| {' | '.join([*cells, where, machine['date']])} |"
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path} was not written by measure.py: {error!r}") from None


def board(folders):
    """All rows under their titles, in Markdown."""
    rows = [line for _, line in sorted(map(row, folders))]
    return "\n".join([f"| {' | '.join(TITLES)} |", "|---" * len(TITLES) + "|", *rows])


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path, nargs="+", metavar="RECORD", help="folders of records")
    print(board(parser.parse_args().records))


if __name__ == "__main__":
    run(main)

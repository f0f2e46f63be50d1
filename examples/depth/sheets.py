#!/usr/bin/env python3
"""Writes nested look-ups as small spreadsheets, a line each, whose nesting depth is known: NAME.input0 and NAME.label.

A sheet has as many words as cells. Word i is cell i: a digit, or `=j`, the value of cell j (with --addends `=j+c`, that value
plus c, modulo 10). Asked for is cell 0, the label is its value, and its nesting depth is how many look-ups it takes: `=2 7 =1`
has depth 2 and label 7. What else could tell the label, or the depth, is the same at every depth: the number of cells; that of
digits, ENDS, which differ from each other; and a second chain of look-ups that is as long as the asked one. All other cells look
up any cell but the asked one. Labels are equally frequent at each depth, no sheet is there twice, and train becomes deeper from
its beginning to its end.
"""

import collections
import random
from pathlib import Path
from typing import Dict, Iterator, List, Set, Tuple

from fairseq_adaptive.command import run
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.files import whole_folder
from fairseq_adaptive.ranges import Parser, Range

DIGITS = 10
GROWS = 0.6  # share of train in which it becomes deeper
ENDS = 4  # cells of a sheet that are digits


def least(depth: int) -> int:
    """How many cells a sheet of a nesting depth has at least: two chains, and the digits that end neither."""
    return 2 * (depth + 1) + ENDS - 2


def sheet(draw: random.Random, cells: int, depth: int, value: int, addends: int = 1) -> List[str]:
    """A random sheet.

    Args:
        draw: source of all that is random
        cells: how many it has, at least :func:`least` of ``depth``
        depth: of the asked cell
        value: of the asked cell
        addends: how many there are, from 0 on; 0 is not written

    Returns:
        its words
    """

    def formula(needed):
        addend = draw.randrange(addends)
        return addend, f"={needed}+{addend}" if addend else f"={needed}"

    order, words = [0, *draw.sample(range(1, cells), cells - 1)], {}
    asked, decoy, others = order[: depth + 1], order[depth + 1 : 2 * depth + 2], order[2 * depth + 2 :]
    for chain in (asked, decoy):
        for cell, needed in zip(chain, chain[1:]):
            addend, words[cell] = formula(needed)
            value -= addend * (chain is asked)
    ends = [value % DIGITS, *draw.sample([digit for digit in range(DIGITS) if digit != value % DIGITS], ENDS - 1)]
    for cell, digit in zip((asked[-1], decoy[-1], *others), ends):
        words[cell] = str(digit)
    known = [cell for cell in words if cell]  # a cell needs one of those before it, so that there are no circles
    for cell in others[ENDS - 2 :]:
        words[cell] = formula(draw.choice(known))[1]
        known.append(cell)
    return [words[cell] for cell in range(cells)]


def depths(words: List[str]) -> List[int]:
    """The nesting depth of every cell."""
    found: Dict[int, int] = {}

    def depth(cell):
        if cell not in found:
            formula = words[cell].startswith("=")
            found[cell] = 1 + depth(int(words[cell][1:].partition("+")[0])) if formula else 0
        return found[cell]

    return [depth(cell) for cell in range(len(words))]


def growing(count: int, deepest: int) -> List[int]:
    """Nesting depths of a training set that is read in its order: those up to ``deepest`` come in one after another, the first
    of them for twice as long as the others, within the first GROWS of it; all that are there are equally frequent."""
    limits = (int(number / (GROWS * count) * (deepest + 1)) for number in range(count))
    return [1 + number % min(max(limit, 1), deepest) for number, limit in enumerate(limits)]


def sheets(seed: str, cells: int, wanted: List[int], seen: Set[str], addends: int = 1) -> Iterator[Tuple[str, int]]:
    """Sheets that are not in ``seen``, which they are added to; at each depth labels take turns.

    Args:
        seed: of all that is random; by it sets differ from each other
        cells: of each
        wanted: depths, of a sheet each

    Returns:
        of each its text and its label
    """
    draw, made = random.Random(seed), collections.Counter()
    for depth in wanted:
        value = made[depth] % DIGITS
        made[depth] += 1
        for _ in range(1000):
            text = " ".join(sheet(draw, cells, depth, value, addends))
            if text not in seen:
                break
        else:
            raise UsageError(f"there are too few sheets of {cells} cells: ask for fewer, or for more --cells")
        seen.add(text)
        yield text, value


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("output", type=Path, help="new folder")
    size = Range(int, 1, 10_000_000)
    parser.add_argument("--train", type=size, default=64_000, metavar="N", help="sheets (default: %(default)s)")
    parser.add_argument("--dev", type=size, default=1_000, metavar="N", help="sheets (default: %(default)s)")
    parser.add_argument("--test", type=size, default=500, metavar="N", help="sheets a depth (default: %(default)s)")
    deep = Range(int, 1, 1_000)
    parser.add_argument("--trained", type=deep, default=6, metavar="D", help="deepest of train (default: %(default)s)")
    parser.add_argument("--deepest", type=deep, default=12, metavar="D", help="of the tests (default: %(default)s)")
    parser.add_argument("--cells", type=Range(int, 2, 1_024), default=28, metavar="N", help="(default: %(default)s)")
    parser.add_argument(
        "--addends",
        type=Range(int, 1, DIGITS),
        default=1,
        metavar="N",
        help="0 to N - 1; 1: references alone (default: 1)",
    )
    parser.add_argument("--seed", type=Range(int, 0, 2**31 - 1), default=1, help="(default: %(default)s)")
    args = parser.parse_args()
    needed = least(max(args.deepest, args.trained))
    if args.cells < needed:
        raise UsageError(f"--cells {args.cells} leaves no room for such depths: they need {needed}")
    # the tests first, so that they are the same ones whatever --train is
    kinds = {f"depth-{depth}": [depth] * args.test for depth in range(1, args.deepest + 1)}
    kinds["dev"] = [1 + number % args.trained for number in range(args.dev)]
    kinds["train"] = growing(args.train, args.trained)
    seen: Set[str] = set()
    with whole_folder(args.output) as folder:
        for name, wanted in kinds.items():
            rows = list(sheets(f"{args.seed} {name}", args.cells, wanted, seen, args.addends))
            for kind, column in (("input0", 0), ("label", 1)):
                with open(Path(folder, f"{name}.{kind}"), "w", encoding="utf-8") as file:
                    file.writelines(f"{row[column]}\n" for row in rows)
    print(
        f"{args.output}: {args.train} sheets to train on, {args.dev} of dev, {args.test} of each depth up to {args.deepest}"
    )


if __name__ == "__main__":
    run(main)

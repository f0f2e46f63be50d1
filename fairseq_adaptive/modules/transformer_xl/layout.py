"""The layout language: which kind of block stands at which depth, ``afff*6,f*8`` for instance."""

import re

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.ranges import Range

BLOCKS = Range(int, 1, 2000)
BLOCK_KINDS = {"a": "attention", "f": "feed-forward"}
_TOKEN = re.compile(r"([a-z]+)(?:\*([0-9]+))?")


def parse_layout(layout: str) -> str:
    """Spell a layout out.

    A layout is a list of groups, separated by commas; a group is a word of ``a`` (attention) and ``f`` (feed-forward),
    and ``*N`` after it repeats it N times. Spaces around commas are allowed.

    Args:
        layout: for instance ``afff*6,f*8``

    Returns:
        one letter a block, for instance ``afffafff...ffffffff`` (32 letters)

    Raises:
        UsageError: at the first character that is wrong, with a pointer to it
    """

    def refuse(place, why):
        raise UsageError(
            f"the layout is malformed at character {place + 1}: {why}\n    {layout}\n    {' ' * place}^\n"
            "a layout is groups of a (attention) and f (feed-forward), separated by commas, each repeated by *N: "
            "afff*6,f*8"
        )

    blocks, count, place = [], 0, 0
    while True:
        place += len(layout[place:]) - len(layout[place:].lstrip(" "))
        match = _TOKEN.match(layout, place)
        if not match:
            refuse(place, "a group of a and f is missing")
        for offset, kind in enumerate(match[1]):
            if kind not in BLOCK_KINDS:
                refuse(place + offset, f"{kind!r} is no kind of block")
        times = match[2] or "1"
        if not times.strip("0"):
            refuse(match.start(2), "a group is repeated once at least")
        count += len(match[1]) * int(times) if len(times) < 9 else BLOCKS.most + 1
        if count > BLOCKS.most:
            refuse(match.start(), f"a model has at most {BLOCKS.most} blocks")
        blocks.append(match[1] * int(times))
        place = match.end()
        place += len(layout[place:]) - len(layout[place:].lstrip(" "))
        if place == len(layout):
            return "".join(blocks)
        if layout[place] != ",":
            refuse(place, "expected ',' or the end" if match[2] else "expected ',', '*N' or the end")
        place += 1


def format_layout(blocks: str) -> str:
    """The shortest layout that :func:`parse_layout` spells out to ``blocks``, one letter a block.

    Dynamic programming over prefixes: the last group is any word, repeated as often as it stands there.
    """
    best = [""]
    for end in range(1, len(blocks) + 1):
        candidates = []
        for length in range(1, end + 1):
            word, times = blocks[end - length : end], 1
            while True:
                start = end - length * times
                group = word if times == 1 else f"{word}*{times}"
                candidates.append(f"{best[start]},{group}" if start else group)
                if start < length or blocks[start - length : start] != word:
                    break
                times += 1
        best.append(min(candidates, key=lambda layout: (len(layout), layout.count(","))))
    return best[-1]

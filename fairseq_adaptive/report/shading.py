"""Tokens with a number each as shaded text: for a terminal by ``rich``, as a page, and as a piece of one for a notebook.

Depth is the background, on one ramp in terminal and page. Skimming is the text itself, which fades to grey: the earlier a
token was skimmed, the paler. Colours are in classes that are named after what they show (``depth-6``, ``skim-13``), so
that pieces with different scales go together in one document.
"""

import html
import math
import os
from typing import Iterable, List, NamedTuple, Optional, Sequence, Tuple

from fairseq_adaptive.printable import printable

WORD_START = "▁"  # of SentencePiece
PAPER, INK = "#ffffff", "#000000"
FAINTEST, LATEST = (
    0.45,
    0.75,
)  # opacity of what was skimmed first, 3.4 to 1 against a white page; and towards the last layer


class Sentence(NamedTuple):
    """Tokens of a text, special ones among them, with a number of each.

    Attributes:
        tokens: as they stand in the text; what begins a word begins with :data:`WORD_START`
        depths: of each token the number of updates, or of another measure, 1 to ``limit``
        limit: the greatest number
        measure: what is numbered
        last: name of the greatest number where it is no number, as ``kept`` is of skimming: then text fades
        first: what the number 1 is called
        label: what a model says of the text, or None
        probability: of the label, or None
        continued: the text goes on from the sentence before, since it was too long to be read at once
    """

    tokens: List[str]
    depths: List[int]
    limit: int
    measure: str = "updates"
    last: Optional[str] = None
    first: int = 1
    label: Optional[str] = None
    probability: Optional[float] = None
    continued: bool = False

    @property
    def names(self) -> List[str]:
        """Of the numbers 1 to ``limit``."""
        greatest = self.first + self.limit - 1
        return [*map(str, range(self.first, greatest)), self.last or str(greatest)]

    @property
    def scale(self) -> str:
        """Name of the classes of its colours: sentences of one scale have the same."""
        kind = "skim" if self.last else "depth" if self.first else "count"
        return f"{kind}-{self.limit}"


def ramp(share: float) -> str:
    """A colour of sRGB, ``#rrggbb``, from shallow (0, pale yellow) to deep (1, dark blue).

    Lightness falls evenly in OKLab (Ottosson, 2020), so that equal steps look equal, in grey and to the colour-blind, too.
    """
    light, chroma, hue = 0.97 - 0.57 * share, 0.05 + 0.09 * share, math.radians(105 + 165 * share)
    a, b = chroma * math.cos(hue), chroma * math.sin(hue)
    l, m, s = (  # noqa: E741  the cones' names
        (light + a * x + b * y) ** 3
        for x, y in ((0.3963377774, 0.2158037573), (-0.1055613458, -0.0638541728), (-0.0894841775, -1.2914855480))
    )
    linear = (
        4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
        -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
        -0.0041960863 * l - 0.7034186147 * m + 1.7076147010 * s,
    )
    return "#" + "".join(f"{round(255 * _encoded(min(1.0, max(0.0, each)))):02x}" for each in linear)


def _encoded(linear):
    return 12.92 * linear if linear <= 0.0031308 else 1.055 * linear ** (1 / 2.4) - 0.055


def ink(colour: str) -> str:
    """Black or white, whichever is easier to read on a colour ``#rrggbb``; at least 4.5 to 1."""
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in channels]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return INK if (luminance + 0.05) ** 2 >= 1.05 * 0.05 else PAPER


def shares(limit: int) -> List[float]:
    """Where the numbers 1 to ``limit`` are on the ramp, 0 to 1."""
    return [number / max(1, limit - 1) for number in range(limit)]


def opacity(share: float) -> float:
    """Of text that was skimmed early (0), late, or never (1)."""
    return 1.0 if share == 1 else FAINTEST + (LATEST - FAINTEST) * share


def spaced(token: str) -> str:
    """A token as it is shown: words apart, special tokens apart, nothing in it controls the rest."""
    token = printable(token)
    return f" {token} " if token.startswith(("[", "<")) else token.replace(WORD_START, " ")


def to_text(sentence: Sentence, colour: bool) -> str:
    """One line for a terminal: the shaded text, or each token with its number behind a slash."""
    before = "… " if sentence.continued else ""
    if not colour:
        names = sentence.names
        pairs = zip(map(printable, sentence.tokens), sentence.depths)
        return before + " ".join(f"{token}/{names[depth - 1]}" for token, depth in pairs)
    return before + _rendered(_runs(sentence), sentence)


def legend(limit: int, measure: str = "updates", last: Optional[str] = None) -> str:
    """The colours of all numbers in one line for a terminal."""
    scale = Sentence([], [], limit, measure, last)
    return f"{measure}: {_rendered([(f' {name} ', number) for number, name in enumerate(scale.names, 1)], scale)}"


def _runs(sentence: Sentence) -> List[Tuple[str, int]]:
    """Neighbours of one number together; a word alone has no space around it."""
    found: List[Tuple[str, int]] = []
    for token, depth in zip(sentence.tokens, sentence.depths):
        if found and found[-1][1] == depth:
            found[-1] = (found[-1][0] + spaced(token), depth)
        else:
            found.append((spaced(token), depth))
    if found:
        found[0] = (found[0][0].lstrip(" "), found[0][1])
        found[-1] = (found[-1][0].rstrip(" "), found[-1][1])
    return found


def _rendered(runs: Sequence[Tuple[str, int]], sentence: Sentence) -> str:
    from rich.console import Console
    from rich.style import Style
    from rich.text import Text

    styles = []
    for share in shares(sentence.limit):
        grey = f"{round(255 * (1 - opacity(share))):02x}"  # black on white, as pale as on a page
        front, back = (f"#{3 * grey}", PAPER) if sentence.last else (ink(ramp(share)), ramp(share))
        styles.append(Style(color=front, bgcolor=back))
    text = Text.assemble(*((part, styles[number - 1]) for part, number in runs))
    true = os.environ.get("COLORTERM") in ("truecolor", "24bit")
    console = Console(force_terminal=True, color_system="truecolor" if true else "256", no_color=False)
    with console.capture() as written:
        console.print(text, soft_wrap=True, end="")
    return written.get()


_SHADED = """
.shaded i{font-style:normal;position:relative;white-space:pre-wrap}
.shaded p{line-height:1.9;margin:.5em 0;overflow-wrap:anywhere}
.shaded b{margin-right:.4em}.shaded small{opacity:.75;margin-right:.6em;font-variant-numeric:tabular-nums}
.shaded i:hover::after{position:absolute;left:0;bottom:100%;padding:0 .4em;font-size:80%;line-height:1.5;white-space:nowrap;
background:#333;color:#fff;border-radius:3px;z-index:1}
@media print{.shaded i{print-color-adjust:exact;-webkit-print-color-adjust:exact}.shaded p{break-inside:avoid}}
"""
_PAGE = """
:root{color-scheme:light dark;--back:#fff;--text:#000}
@media screen and (prefers-color-scheme:dark){:root{--back:#17171b;--text:#f2f2f5}}
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:0 auto;padding:1rem;background:var(--back);color:var(--text)}
h1{font-size:1.3rem;overflow-wrap:anywhere}.shaded{overflow-wrap:anywhere}
@media print{body{max-width:none;padding:0}}
"""


def style(sentences: Iterable[Sentence]) -> str:
    """The CSS of sentences: a class for each number of each of their scales, and what shows it under the pointer."""
    rules = {}
    for sentence in sentences:
        if sentence.scale not in rules:
            selectors = [f".{sentence.scale} .{_class(number)}" for number in range(1, sentence.limit + 1)]
            rules[sentence.scale] = "\n".join(map(_rule, selectors, shares(sentence.limit), sentence.names))
    return _SHADED + "\n".join(rules.values()) + "\n"


def _rule(selector: str, share: float, name: str) -> str:
    if selector.startswith(".skim"):
        look = f"opacity:{opacity(share):.2f}"
    else:
        look = f"background:{ramp(share)};color:{ink(ramp(share))};padding:.15em 0"
    return f'{selector}{{{look}}}{selector}:hover::after{{content:"{name}"}}'


def _class(number: int) -> str:
    return f"d{number}"  # short, since a page has it for every token


def lines(sentences: Iterable[Sentence]) -> str:
    """Every sentence as a paragraph: label and probability, where there are any, and the shaded text. Everything is
    escaped. :func:`style` says what the classes look like."""
    return "".join(map(_line, sentences))


def _line(sentence: Sentence) -> str:
    head = ""
    if sentence.label is not None:
        head = f"<b>{html.escape(printable(sentence.label))}</b>"
    if sentence.probability is not None:
        head += f"<small>{sentence.probability:.3f}</small>"
    head += "<small>… continued</small>" * sentence.continued
    # a text has the direction of its first letter
    return f'<p class="{sentence.scale}">{head}<bdi>{_spans(_runs(sentence))}</bdi></p>\n'


def _spans(runs):
    return "".join(f"<i class={_class(depth)}>{html.escape(text)}</i>" for text, depth in runs)


def key(sentence: Sentence) -> str:
    """The legend of a sentence's scale as a paragraph."""
    shown = [(f" {name} ", number) for number, name in enumerate(sentence.names, 1)]
    return f'<p class="{sentence.scale}">{html.escape(sentence.measure)}: {_spans(shown)}</p>\n'


def to_fragment(sentences: Iterable[Sentence]) -> str:
    """A piece of a document, as ``_repr_html_`` returns it: style, a legend for each scale, and the shaded texts.

    The text has the colour of the document around it, light or dark.
    """
    sentences = list(sentences)
    scales = {sentence.scale: sentence for sentence in sentences}
    keys = "".join(map(key, scales.values()))
    return f'<style>{style(sentences)}</style>\n<div class="shaded">\n{keys}{lines(sentences)}</div>\n'


def to_html(sentences: Iterable[Sentence], title: str) -> str:
    """A page of its own, which loads nothing: :func:`to_fragment` under a title."""
    title = html.escape(printable(title))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{title}</title><style>{_PAGE}</style></head>\n<body><h1>{title}</h1>\n{to_fragment(sentences)}</body></html>\n"
    )

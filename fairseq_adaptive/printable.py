"""Texts of others as they may stand in a terminal and on a page: nothing in them controls how the rest is shown."""

import unicodedata

# marks, embeddings, overrides and isolates of the Unicode bidirectional algorithm
_BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def printable(text: str) -> str:
    r"""A text with its control characters as escapes: ``\x1b`` begins a command to the terminal, ``\u202e`` turns a
    line round, ``\n`` and the separators of lines and paragraphs make two of one.

    Everything else stays: letters of all scripts, joiners, spaces.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escaped(each) if _controls(each) else each for each in text)


def _controls(character):
    return character in _BIDI or unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")


def _escaped(character):
    return character.encode("unicode_escape").decode()

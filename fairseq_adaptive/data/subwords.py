"""Text that is cut into the tokens of a model by subword-nmt, or is cut already."""

import io
import os
from typing import List

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.files import read_lines

CONTINUED = "@@"  # at the end of a token whose word goes on
WORD_START = "▁"


def as_in_text(tokens: List[str]) -> List[str]:
    """Tokens of subword-nmt with SentencePiece's sign before those that begin a word, and none at those that do not:
    ``["lu@@", "mp", "."]`` to ``["▁lu", "mp", "▁."]``."""
    inside = [False, *(token.endswith(CONTINUED) for token in tokens)]
    return [("" if goes_on else WORD_START) + token.removesuffix(CONTINUED) for goes_on, token in zip(inside, tokens)]


class Tokenized:
    """Text that is cut into tokens already, with spaces between."""

    path = "the text"
    advice = "is not cut into tokens as its training text was"

    def tokenize(self, text: str) -> List[str]:
        return text.split()


class SubwordNMT(Tokenized):
    """Words, with spaces between, to pieces.

    Args:
        path: the file of codes that ``subword-nmt learn-bpe`` wrote

    Raises:
        UsageError: when there is none, it holds something else, or subword-nmt is not installed
    """

    advice = "does not hold the codes with which its training text was split"

    def __init__(self, path):
        try:
            from subword_nmt.apply_bpe import BPE
        except ImportError:
            raise UsageError("to split words by codes, install subword-nmt: pip install subword-nmt") from None
        self.path = os.fspath(path)
        lines = read_lines(path)
        wrong = next((line for line in lines if not line.startswith("#version:") and len(line.split(" ")) != 2), None)
        if not lines or wrong is not None:  # the library ends the program
            raise UsageError(f"{path} holds no codes of subword-nmt: a line is two pieces of words, not {wrong!r:.40}")
        self._bpe = BPE(io.StringIO("\n".join(lines)))

    def tokenize(self, text: str) -> List[str]:
        return self._bpe.process_line(text).split()

"""fairseq's dictionaries in plain torch: words and their numbers."""

import os
from typing import Iterable, List

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.files import read_lines

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")


class Words:
    """Words by number and numbers by word, called as fairseq's ``Dictionary`` is.

    Args:
        words: those behind fairseq's four special ones

    Attributes:
        symbols: all words, in order
        indices: their numbers
    """

    nspecial = len(SPECIAL)

    def __init__(self, words: Iterable[str]):
        self.symbols: List[str] = list(SPECIAL)
        self.indices = {word: number for number, word in enumerate(SPECIAL)}
        for word in words:
            self.add_symbol(word)

    @classmethod
    def read(cls, path, further: Iterable[str] = ()) -> "Words":
        """From a ``dict.txt``: a word and its count a line.

        Args:
            further: words that a task adds behind those of the file

        Raises:
            UsageError: for a file that is missing or of another form
        """
        if not os.path.isfile(path):
            raise UsageError(f"there is no {path}, the dictionary of the model")
        words = []
        for number, line in enumerate(read_lines(path), start=1):
            word, _, count = line.rstrip().removesuffix("#fairseq:overwrite").rstrip().rpartition(" ")
            if not word or not count.lstrip("-").isdigit():
                raise UsageError(f"line {number} of {path} is {line!r:.60}: it has a word, a space and a count")
            words.append(word)
        if len({*words, *SPECIAL}) < len(words) + len(SPECIAL):
            raise UsageError(f"{path} has words twice, or fairseq's own ({', '.join(SPECIAL)}): numbers would shift")
        return cls([*words, *further])

    def add_symbol(self, word: str) -> int:
        """Return the number of a word, a new one where it is new."""
        if word not in self.indices:
            self.indices[word] = len(self.symbols)
            self.symbols.append(word)
        return self.indices[word]

    def __len__(self) -> int:
        return len(self.symbols)

    def __getitem__(self, number: int) -> str:
        return self.symbols[number] if number < len(self.symbols) else SPECIAL[self.unk()]

    def index(self, word: str) -> int:
        """The number of a word, that of ``<unk>`` where it is unknown."""
        return self.indices.get(word, self.unk())

    def bos(self) -> int:
        return 0

    def pad(self) -> int:
        return 1

    def eos(self) -> int:
        return 2

    def unk(self) -> int:
        return 3

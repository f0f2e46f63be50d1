"""Which tokens a masked language model has to guess, and what it sees in their place."""

from typing import Tuple

import numpy as np
from fairseq.data import Dictionary

from fairseq_adaptive.errors import UsageError

WORD_START = "▁"  # of SentencePiece


class NgramMask:
    """N-gram masking (Lan et al., 2020, section 4.1).

    Spans of n whole words are drawn with p(n) proportional to 1/n, up to the longest, until the share of tokens is
    reached; the last span is cut there. Of the tokens drawn, 80% become ``<mask>``, 10% any token of the dictionary and
    10% stay as they are. In a dictionary without SentencePiece's mark of word starts every token is a word.

    Args:
        dictionary: with ``<mask>``
        probability: share of the tokens to draw, at least one of a text
        longest: N, the most words in a span; 1 draws single words
        leave_unmasked: share of the drawn tokens that stay
        random: share that become any token

    Raises:
        UsageError: for values outside their ranges
    """

    def __init__(
        self,
        dictionary: Dictionary,
        probability: float = 0.15,
        longest: int = 3,
        leave_unmasked: float = 0.1,
        random: float = 0.1,
    ):
        if not 0 < probability <= 1:
            raise UsageError(f"--mask-prob {probability} is impossible: it must be above 0 and at most 1")
        if longest < 1:
            raise UsageError(f"--mask-ngram {longest} is impossible: a span has at least 1 word")
        if min(leave_unmasked, random) < 0 or leave_unmasked + random > 1:
            raise UsageError(
                f"--leave-unmasked-prob {leave_unmasked} and --random-token-prob {random} must be 0 or "
                "more and sum to at most 1"
            )
        self.probability, self.longest, self.leave_unmasked, self.random = probability, longest, leave_unmasked, random
        self.pad, self.mask = dictionary.pad(), dictionary.index("<mask>")
        self.special = [dictionary.bos(), dictionary.eos(), dictionary.pad()]
        symbols = dictionary.symbols
        marked = np.array([symbol.startswith(WORD_START) for symbol in symbols])
        self.starts_word = marked if marked.any() else np.ones(len(symbols), dtype=bool)
        self.replacements = np.array(
            [
                number
                for number, symbol in enumerate(symbols)
                if number >= dictionary.nspecial and number != self.mask and not symbol.startswith("madeupword")
            ]
        )
        share = 1 / np.arange(1, longest + 1)
        self.share = share / share.sum()

    def __call__(self, tokens: np.ndarray, rng: np.random.Generator) -> Tuple[np.ndarray, np.ndarray]:
        """Return what the model sees, and the tokens it has to guess, with padding elsewhere; both T.

        Args:
            tokens: T, with special symbols, which are not masked and end a span
            rng: draws everything
        """
        words = self._words(tokens)
        budget = max(1, int(self.probability * sum(map(len, words)) + rng.random()))
        drawn = np.zeros(len(tokens), dtype=bool)
        lengths = rng.choice(self.longest, size=len(words), p=self.share) + 1
        for word, length in zip(rng.permutation(len(words)), lengths):
            span = np.concatenate(words[word : word + length])
            span = span[span - span[0] == np.arange(len(span))]  # not past a special symbol
            span = span[~drawn[span]][:budget]
            drawn[span] = True
            budget -= len(span)
            if not budget:
                break
        source, target = tokens.copy(), np.where(drawn, tokens, self.pad)
        chance = rng.random(len(tokens))
        source[drawn] = self.mask
        kept = drawn & (chance < self.leave_unmasked)
        source[kept] = tokens[kept]
        replaced = drawn & (chance >= 1 - self.random)
        source[replaced] = rng.choice(self.replacements, size=int(replaced.sum()))
        return source, target

    def _words(self, tokens):
        """Positions of the tokens of each word, a list of arrays."""
        plain = ~np.isin(tokens, self.special)
        after_special = np.append(True, ~plain[:-1])
        positions = np.flatnonzero(plain)
        starts = (self.starts_word[tokens] | after_special)[positions]
        return np.split(positions, np.flatnonzero(starts)[1:])

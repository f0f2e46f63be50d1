"""How many words to draft, from what rounds have cost so far."""

import time
from typing import Dict, List, Tuple

_TRIED = 2  # so often, before a number of drafts is judged
_AGAIN = 24  # after so many rounds another number is tried once more
_FORGETS = 0.9  # what is left of older rounds with each new one


class Pace:
    """Chooses the number of drafts of a round: the one with which words have cost least.

    A round over few rows costs hardly more than one over a single row, since weights must be read in any case; one over many
    rows costs as much more as it has rows, so that drafts that are not said are lost. Where that turns over depends on the
    machine, the sizes of the model and how often drafts are right: it is measured in the search itself, for each power of 2
    of sentences. It never changes what is said.

    Args:
        most: K, drafts at most
        clock: seconds
    """

    def __init__(self, most: int, clock=time.perf_counter):
        self._clock = clock
        self.choices = sorted({0, most, *(1 << power for power in range(most.bit_length()) if 1 << power < most)})
        self._spent: Dict[int, Dict[int, List[float]]] = {}  # of a size and a number: rounds, seconds, words
        self._rounds: Dict[int, int] = {}

    def _of(self, sentences: int) -> Dict[int, List[float]]:
        return self._spent.setdefault(sentences.bit_length(), {each: [0, 0.0, 0.0] for each in self.choices})

    def cost(self, sentences: int) -> Dict[int, float]:
        """Seconds a word of each number of drafts that has been tried."""
        return {each: seconds / words for each, (_, seconds, words) in self._of(sentences).items() if words}

    def choose(self, sentences: int) -> int:
        """How many words to draft where so many sentences run."""
        spent = self._of(sentences)
        size = sentences.bit_length()
        self._rounds[size] = number = self._rounds.get(size, 0) + 1
        untried = [each for each in reversed(self.choices) if spent[each][0] < _TRIED]
        if untried:
            return untried[0]
        cost = self.cost(sentences)
        best = min(cost, key=cost.get)
        if number % _AGAIN == 0:  # a neighbour of the best: what is far worse stays so
            place = self.choices.index(best)
            near = [each for each in (place - 1, place + 1) if 0 <= each < len(self.choices)]
            return self.choices[near[number // _AGAIN % len(near)]]
        return best

    def begin(self) -> Tuple:
        return self._clock()

    def end(self, began, sentences: int, draft: int, words: int):
        """Count a round."""
        spent = self._of(sentences)[draft]
        spent[0] += 1
        if spent[0] == 1:
            return  # the first of a size makes room
        spent[1] = spent[1] * _FORGETS + (self._clock() - began)
        spent[2] = spent[2] * _FORGETS + words

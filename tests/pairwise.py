"""Fewer cases of a product: so many that every two values which go together somewhere do so in one of them.

What breaks a case is nearly always one value or two that meet (Kuhn et al., 2004, "Software fault interactions"). With
``TEST_CASES=all`` in the environment nothing is left out.
"""

import itertools
import os
from typing import Hashable, List, Sequence, Tuple


def all_cases() -> bool:
    """Whether nothing is to be left out."""
    return os.environ.get("TEST_CASES") == "all"


def pairwise(cases: Sequence[Tuple[Hashable, ...]]) -> List[Tuple[Hashable, ...]]:
    """Cases in their order without those that bring no new pair of values, chosen greedily.

    Args:
        cases: tuples of one length, a value of each parameter; those of a product that make sense together
    """
    cases = list(cases)
    if all_cases():
        return cases
    pairs = [_pairs(case) for case in cases]
    missing, chosen = set().union(*pairs), []
    while missing:
        best = max(range(len(cases)), key=lambda number: len(pairs[number] & missing))  # the first of the best
        chosen.append(best)
        missing -= pairs[best]
    return [cases[number] for number in sorted(chosen)]


def _pairs(case):
    return set(itertools.combinations(enumerate(map(repr, case)), 2))

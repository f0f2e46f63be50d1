"""Cases that are left out of a product bring no pair of values that the rest lacks."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from pairwise import pairwise

PRODUCT = list(itertools.product("abc", (1, 2, 3), (False, True), "xy"))


@given(st.lists(st.sampled_from(PRODUCT), min_size=1, unique=True))
def test_every_pair_stays(cases):
    chosen = pairwise(cases)
    for one, other in itertools.combinations(range(4), 2):
        assert {(case[one], case[other]) for case in chosen} == {(case[one], case[other]) for case in cases}
    assert [case for case in cases if case in chosen] == chosen


def test_how_many_stay():
    assert len(pairwise(PRODUCT)) == 9 < len(PRODUCT)


def test_all_on_demand(monkeypatch):
    monkeypatch.setenv("TEST_CASES", "all")
    assert pairwise(PRODUCT) == PRODUCT

import pytest

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules import STRATEGIES, layer_schedule


@pytest.mark.parametrize(
    "strategy, unique, total, expected",
    [
        # Takase and Kiyono (2021), Figure 1 and Table 1
        ("sequence", 3, 6, "001122"),
        ("cycle", 3, 6, "012012"),
        ("cycle_rev", 3, 6, "012210"),
        ("sequence", 6, 18, "000111222333444555"),
        ("cycle", 6, 18, "012345" * 3),
        ("cycle_rev", 6, 18, "012345012345543210"),
        # the authors' code where M does not divide N
        ("sequence", 3, 7, "0001112"),
        ("cycle", 3, 7, "0120120"),
        ("cycle_rev", 3, 7, "0120210"),
        # Mixture-of-Recursions: the first and the last depth are not shared
        ("middle_cycle", 4, 8, "01212123"),
        ("middle_sequence", 4, 8, "01112223"),
        ("middle_cycle", 12, 32, [0, *(1 + depth % 10 for depth in range(30)), 11]),
        ("middle_cycle", 3, 5, "01112"),
        ("middle_cycle", 2, 2, "01"),
    ],
)
def test_published_tables(strategy, unique, total, expected):
    assert list(layer_schedule(strategy, unique, total)) == list(map(int, expected))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("total", range(1, 13))
def test_every_schedule(strategy, total):
    for unique in range(3 if strategy.startswith("middle") else 1, total + 1):
        schedule = layer_schedule(strategy, unique, total)
        assert isinstance(schedule, tuple) and len(schedule) == total and schedule[0] == 0
        assert set(schedule) <= set(range(unique))
        if not strategy.endswith("sequence") or total % unique == 0:
            assert set(schedule) == set(range(unique))
        if strategy.startswith("middle"):
            assert schedule.count(0) == schedule.count(unique - 1) == 1 and schedule[-1] == unique - 1
        if strategy.endswith("sequence"):
            assert list(schedule) == sorted(schedule)
        if strategy == "cycle_rev" and total >= 2 * unique:
            assert schedule[-unique:] == tuple(reversed(range(unique)))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_sharing_and_full_sharing(strategy):
    assert layer_schedule(strategy, 6, 6) == (0, 1, 2, 3, 4, 5)
    if not strategy.startswith("middle"):
        assert layer_schedule(strategy, 1, 6) == (0,) * 6


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("spiral", 3, 6), "'spiral': choose one of sequence, cycle, cycle_rev"),
        (("cycle", 7, 6), "7 unique layers cannot serve 6 depths.*between 1 and 6"),
        (("cycle", 0, 6), "0 unique layers cannot serve 6 depths.*between 1 and 6"),
        (("sequence", -1, 6), "-1 unique layers.*between 1 and 6"),
        (("cycle", 1, 0), "at least 1 layer, not 0"),
        (("middle_cycle", 2, 6), "the first and the last of 6 depths.*at least 3 unique layers, not 2"),
        (("middle_sequence", 1, 6), "at least 3 unique layers, not 1"),
    ],
)
def test_impossible_values_say_what_is_possible(arguments, message):
    with pytest.raises(UsageError, match=message):
        layer_schedule(*arguments)
    with pytest.raises(ValueError):
        layer_schedule(*arguments)

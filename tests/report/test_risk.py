"""p-values against exact sums, and the guarantee by simulation."""

import math
import random
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairseq_adaptive.report.risk import binomial_tail, examples_needed, fixed_sequence, hoeffding_bentkus

shares = st.floats(0.001, 0.999)


@pytest.mark.parametrize("count", (1, 7, 60))
@pytest.mark.parametrize("share", (Fraction(1, 50), Fraction(1, 3), Fraction(9, 10)))
def test_the_binomial_tail_is_the_exact_sum(count, share):
    total = Fraction(0)
    for hits in range(count + 1):
        total += math.comb(count, hits) * share**hits * (1 - share) ** (count - hits)
        assert binomial_tail(hits, count, float(share)) == pytest.approx(float(total), rel=1e-11)
    assert total == 1 and binomial_tail(count + 3, count, float(share)) == 1


def test_p_values_by_hand():
    """Bentkus where a few examples lose all; Hoeffding where many lose a little; and 1 above the tolerance."""
    tail = sum(math.comb(200, hits) * 0.1**hits * 0.9 ** (200 - hits) for hits in range(9))
    assert hoeffding_bentkus(8 / 200, 200, 0.1) == pytest.approx(
        min(math.e * tail, math.exp(-200 * (0.04 * math.log(0.4) + 0.96 * math.log(0.96 / 0.9))))
    )
    bound = math.exp(-200 * (0.041 * math.log(0.41) + 0.959 * math.log(0.959 / 0.9)))
    more = tail + math.comb(200, 9) * 0.1**9 * 0.9**191  # a mean of 8.2 counts as 9
    assert hoeffding_bentkus(0.041, 200, 0.1) == pytest.approx(min(bound, math.e * more))
    assert hoeffding_bentkus(0.0, 100, 0.02) == pytest.approx(0.98**100)
    assert hoeffding_bentkus(0.02, 100, 0.02) == hoeffding_bentkus(0.5, 100, 0.02) == 1
    assert hoeffding_bentkus(1.0, 5, 0.999) == 1


def test_a_mean_of_whole_losses_is_not_rounded_up():
    for count in (149, 300, 997):
        for hits in range(20):
            mean = math.fsum([1.0] * hits) / count
            exact = math.e * binomial_tail(hits, count, 0.3)
            assert hoeffding_bentkus(mean, count, 0.3) <= min(1.0, exact) * (1 + 1e-9)


@given(shares, shares, st.integers(1, 400), shares)
def test_p_values_are_monotone(one, other, count, tolerance):
    """The more is lost, the larger; the more is tolerated, the smaller."""
    low, high = sorted((one, other))
    assert hoeffding_bentkus(low, count, tolerance) <= hoeffding_bentkus(high, count, tolerance) * (1 + 1e-9)
    assert hoeffding_bentkus(tolerance, count, high) <= hoeffding_bentkus(tolerance, count, low) * (1 + 1e-9)
    assert 0 <= hoeffding_bentkus(one, count, tolerance) <= 1


@pytest.mark.parametrize("tolerance, confidence, needed", ((0.02, 0.95, 149), (0.05, 0.9, 45), (0.5, 0.5, 1)))
def test_how_many_examples_are_needed(tolerance, confidence, needed):
    assert examples_needed(tolerance, confidence) == needed
    assert hoeffding_bentkus(0.0, needed, tolerance) <= 1 - confidence + 1e-12
    assert needed == 1 or hoeffding_bentkus(0.0, needed - 1, tolerance) > 1 - confidence


def test_a_sequence_ends_at_the_first_that_fails():
    asked = []

    def losses_of(value):
        asked.append(value)
        return [0.0] * 500 if value != 0.5 else [1.0] * 500

    found = list(fixed_sequence((0.9, 0.7, 0.5, 0.3), losses_of, 0.02, 0.95))
    assert asked == [0.9, 0.7, 0.5] and [each.kept for each in found] == [True, True, False]
    assert [each.loss for each in found] == [0, 0, 1] and found[0].p == pytest.approx(0.98**500)


@pytest.mark.parametrize("whole", (True, False), ids=("0 or 1", "any in between"))
@pytest.mark.parametrize("examples", (200, 1000))
def test_the_guarantee(whole, examples):
    """Of 400 draws of the examples, what is kept has a risk above the tolerance in at most 10%, and it often keeps some.

    The true risks lie close on both sides of the tolerance of 0.1, the losses of all values are of the same examples.
    """
    rng, tolerance, confidence = random.Random(examples), 0.1, 0.9
    risks = {0.9: 0.02, 0.8: 0.06, 0.7: 0.09, 0.6: 0.101, 0.5: 0.12, 0.4: 0.2}
    broken = kept = 0
    for _ in range(400):
        draws = [rng.random() for _ in range(examples)]
        sizes = [1.0 if whole else rng.random() * 2 for _ in range(examples)]  # 2: a mean of 1 with the cut below

        def losses_of(value):
            hits = (size if draw < risks[value] else 0.0 for draw, size in zip(draws, sizes))
            return [min(1.0, each) for each in hits]

        scale = 1.0 if whole else 0.75  # the mean of min(1, 2 u)
        last = [each.value for each in fixed_sequence(risks, losses_of, tolerance, confidence) if each.kept]
        broken += any(risks[value] * scale > tolerance for value in last)
        kept += bool(last)
    assert broken <= 0.1 * 400 and kept > 0.9 * 400

"""The composition matrix, see :mod:`composition`: what goes together runs, and what does not is refused with the reason.

What is covered. Every two values of (family, schedule, router, rule, reader, ``--router-kv``, ``--halting-kv``) that go
together at all are together in one of some hundred models, each of which is run dense and packed, saved and loaded,
decoded one token at a time where it has a decoder, and trained. Every reason is met on every family that has it, and
every schedule x router x rule x answer x answer is asked of what pairs them. More than two at a time, other shapes and
other options are left to the random cases of ``modules/test_random_stacks.py``; other batches to
``test_batch_invariance.py``.

``python tests/test_composition.py`` writes docs/composition.md, which a test compares.
"""

import itertools
import sys
from pathlib import Path

import pytest
from torch import nn

if __name__ == "__main__":
    import conftest  # noqa: F401  what pytest imports before a test

from composition import DEPTHS, FAMILIES, KV, READERS, ROUTERS, RULES, SCHEDULES, Case, all_pairs, made, reasons
from composition_page import page
from composition_runs import check
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules.policies import Place, Reader, Router, build_policy
from fairseq_adaptive.modules.policies.pairing import check_pairing

PAGE = Path(__file__).parents[1] / "docs" / "composition.md"


@pytest.mark.parametrize("case", all_pairs(), ids=str)
def test_what_goes_together_runs(case):
    check(case)


def refused(family: str):
    """For every set of reasons of a family the first case that has it; cases with few policies come first."""
    found = {}
    for schedule, router, rule, reader, pair in itertools.product(
        FAMILIES[family].schedules, ROUTERS, RULES, READERS, (*((None, kv) for kv in KV), *((kv, None) for kv in KV))
    ):
        case = Case(family, schedule, router, rule, reader, *pair)
        if FAMILIES[family].side != "decoder" or reader == "none":
            for reason in reasons(case)[:1]:
                found.setdefault(reason, case)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_what_does_not_go_together_is_refused_with_the_reason(family):
    found = refused(family)
    assert len(found) > 5
    for case in found.values():
        with pytest.raises(UsageError) as error:
            made(case)
        assert any(reason in str(error.value) for reason in reasons(case)), (case, str(error.value))


def test_every_pairing_is_refused_or_not():
    """All schedules, routers, rules and answers, at what models ask when they are built."""
    count = 0
    for name, router in itertools.product(SCHEDULES, ROUTERS):
        schedule = tuple(map(int, SCHEDULES[name][2].split()))
        place = Place(8, DEPTHS, nn.Identity(), 2, schedule)
        if any("share layers" in each for each in reasons(Case("shared_transformer", name, router))):
            with pytest.raises(UsageError, match="share layers"):
                build_policy("router", router, place)
            continue
        policy = build_policy("router", router, place)
        for rule in RULES:
            halting = build_policy("halting", rule, place)
            for pair in itertools.product(KV, KV):
                expected = reasons(Case("its decoder alone", name, router, rule, "none", *pair))
                expected = [each for each in expected if "causal decoder" not in each]  # the stack's, not the pair's
                try:
                    check_pairing(policy, halting, *pair, schedule)
                except UsageError as error:
                    assert any(each in str(error) for each in expected), (name, router, rule, pair, str(error))
                else:
                    assert not expected, (name, router, rule, pair, expected)
                count += 1
    assert count == (7 * 6 - 2) * 7 * 36


def test_a_policy_must_answer():
    """What a router and a reader are asked has no default: it is missed when they are made, not in the first run."""

    class Silent(Router, nn.Module):
        pass

    class Blank(Reader):
        pass

    for policy, method in ((Silent, "choose"), (Blank, "read")):
        with pytest.raises(TypeError, match=method):
            policy()


def test_the_page_says_so():
    assert PAGE.read_text() == page(), "python tests/test_composition.py writes it anew"


if __name__ == "__main__":
    PAGE.write_text(page())
    sys.exit()

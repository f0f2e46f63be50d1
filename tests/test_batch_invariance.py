"""Batch invariance: any sentence has the same output, hypothesis and score alone and in any batch, on every family under
several policies, dense, packed and in beam search."""

import random

import pytest
import torch

from composition import FAMILIES, Case, made, reasons
from composition_runs import alone, hypotheses, inputs, run, same, there

BATCHES, GENERATE = 20, ("shared_transformer", "shared_transformer_lm", "par_transformer_xl")
# each family has those of these that are legal there; a schedule that it has not becomes its first
POLICIES = (
    ("cycle", "mixture_of_recursions", "act", "first"),
    ("middle_cycle", "token_choice", "pondernet", "later", "recompute", "active"),
    ("middle_sequence", "mixture_of_depths", "ut_act", "none", "active", "keep"),
    ("cycle", "skimming", "saturation", "first", "recompute", "recompute"),
    ("cycle", "none", "act", "later"),
    ("one", "mixture_of_recursions", "act", "none", "first", "first"),
    ("cycle", "none", "margin"),
    ("cycle", "none", "none"),
)


def cases():
    for name, family in FAMILIES.items():
        found = []
        for schedule, *rest in POLICIES:
            schedule = schedule if schedule in family.schedules else family.schedules[0]
            case = Case(name, schedule, *rest)
            case = case if family.reads else case._replace(reader="none")
            if not reasons(case):
                found.append(case)
        yield from found[:3]


CASES = list(cases())
FIRST = {case.family: case for case in reversed(CASES)}.values()  # others search in four batches only, which is slow


def batch_with(case, given, row, rng):
    """A batch of random others with one sentence of another batch, ``row`` of it, at a random place; and which place."""
    one, arch = alone(case, given, row), FAMILIES[case.family].arch
    others = inputs(case, [rng.randint(1, 7) for _ in range(rng.randint(1, 4))], rng.randrange(10**6))
    at, found = rng.randint(0, len(next(iter(others.values())))), {}
    for name, each in others.items():
        mine = one[name]
        if each.dim() > 1 and name not in ("elements", "image"):
            filler = {"x": 9.0, "src_key_padding_mask": True}.get(name, 1)  # what is at padding never counts
            left = arch == "shared_transformer" and name == "src_tokens"
            size = max(each.size(1), mine.size(1))
            each, mine = (wider(part, size, filler, left) for part in (each, mine))
        found[name] = torch.cat((each[:at], mine, each[at:]))
    return found, at


def wider(x, size, filler, left):
    blank = x.new_full((len(x), size - x.size(1), *x.shape[2:]), filler)
    return torch.cat((blank, x) if left else (x, blank), 1)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_sentence_does_not_feel_its_batch(case):
    model, rng = made(case), random.Random(str(case))
    given = inputs(case, [5, 3, 7])
    one = alone(case, given, 0)
    expected = {kind: run(case, model, one, kind)[0][0] for kind in (False, True)}
    same(case, expected[True], expected[False])
    words = hypotheses(model, one)[0] if case.family in GENERATE else None
    for number in range(BATCHES):
        batch, at = batch_with(case, given, 0, rng)
        out = run(case, model, batch, bool(number % 2))[0][at]
        same(case, out if there(case, one) is None else out[: there(case, one).size(1)], expected[False])
        if words is not None and (number < 4 or case in FIRST):
            found = hypotheses(model, batch)[at]
            assert found[0] == words[0] and found[1] == pytest.approx(words[1], abs=1e-7)

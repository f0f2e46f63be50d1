"""Q-exit: where a token's distribution over depths reaches the quantile it stops, with every rule that has one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from composition import FAMILIES, Case, made, reasons, stacks
from composition_runs import alone, check_runs, check_steps, inputs, run, same, there
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules import Step, Trace
from fairseq_adaptive.modules.policies import ACT, LoopGate, PonderNet, StickBreaking, UniversalACT
from models.test_policy_flags import made as built
from old_checkpoints.cases import flags_of, inputs as batch_of, unsettle

KINDS = (ACT, UniversalACT, PonderNet, LoopGate, StickBreaking)
RULES = ("act", "ut_act", "pondernet", "loop_gate", "stick_breaking")
DEPTHS, TOKENS, DIM = 7, 30, 5
GRID = (0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95, 1.0)
quantiles = st.floats(0.01, 1.0)


def turn(x):
    return torch.tanh(1.7 * x.roll(1, -1) + 0.3)


def rule_of(kind, seed, bias=-1.0):
    torch.manual_seed(seed)
    rule = kind(DIM, bias=bias).double().eval()
    torch.nn.init.normal_(rule.unit.weight)
    return rule, torch.randn(TOKENS, DIM, dtype=torch.float64)


def through(rule, x, depths=DEPTHS):
    """Result and updates of a run over states T x C; every token is on its own."""
    running, carry, updates = torch.ones(len(x), dtype=torch.bool), rule.start(x), torch.zeros(len(x), dtype=torch.long)
    for depth in range(depths):
        updates += running
        x, carry, running, _ = rule.step(x, turn(x), carry, running, depth == depths - 1)
    return rule.output(x, carry), updates


def by_hand(rule, x, quantile):
    """Result and updates of one token, C, by the papers' sums."""
    unit = lambda state: float(torch.sigmoid(rule.unit.weight[0] @ state + rule.unit.bias[0]))  # noqa: E731
    adds, blends = isinstance(rule, (UniversalACT, StickBreaking)), type(rule) is ACT
    state, result, halted = x, torch.zeros_like(x), 0.0
    for depth in range(1, DEPTHS + 1):
        before, state = state, turn(state)
        if isinstance(rule, ACT):
            p = unit(before if adds else state)
            ends = halted + p > min(quantile, 0.99)
        else:
            p = (1 - halted) * (1 if depth == DEPTHS and isinstance(rule, PonderNet) else unit(state))
            ends = halted + p >= (min(quantile, 0.999) if adds else quantile)
        share = 1 - halted if ends or (depth == DEPTHS and type(rule) is StickBreaking) else p
        halted += p
        if adds:  # ACT's accumulator keeps what its weights leave
            result = share * state + ((1 - share) * result if isinstance(rule, ACT) else result)
        if blends:
            state = share * state + (1 - share) * before
        if ends:
            break
    return (result if adds else state), depth


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 10**6), quantile=quantiles, bias=st.floats(-3, 1))
@settings(max_examples=20)
@torch.no_grad()
def test_a_token_stops_where_its_distribution_reaches_the_quantile(kind, seed, quantile, bias):
    rule, x = rule_of(kind, seed, bias)
    rule.exit_at(quantile)
    result, updates = through(rule, x)
    for token in range(0, TOKENS, 5):
        expected, depth = by_hand(rule, x[token], quantile)
        assert updates[token] == depth
        torch.testing.assert_close(result[token], expected)


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 10**6), grid=st.lists(quantiles, min_size=2, max_size=6), bias=st.floats(-3, 1))
@settings(max_examples=20)
@torch.no_grad()
def test_the_higher_the_quantile_the_deeper(kind, seed, grid, bias):
    rule, x = rule_of(kind, seed, bias)
    taken = []
    for quantile in sorted(grid):
        rule.exit_at(quantile)
        taken.append(through(rule, x)[1])
    assert all((later >= earlier).all() for earlier, later in zip(taken, taken[1:]))


@pytest.mark.parametrize("kind", (ACT, UniversalACT, StickBreaking))
def test_training_and_what_the_rule_ends_do_not_change(kind):
    """A quantile of 1 is the rule's own evaluation, and any quantile leaves training alone."""
    rule, x = rule_of(kind, 1)
    plain, updates = through(rule, x)
    trained = through(rule.train(), x)
    rule.exit_at(1.0)
    torch.testing.assert_close(through(rule.eval(), x)[0], plain, rtol=0, atol=0)
    rule.exit_at(0.3)
    assert (through(rule.eval(), x)[1] < updates).any()
    for one, other in zip(through(rule.train(), x), trained):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", (PonderNet, LoopGate))
def test_it_is_the_threshold_of_a_rule_that_halts_in_evaluation_alone(kind):
    rule, x = rule_of(kind, 1)
    rule.threshold = 0.3
    expected = through(rule, x)
    rule, _ = rule_of(kind, 1)
    rule.exit_at(0.3)
    assert rule.threshold == 0.3 and all(map(torch.equal, through(rule, x), expected))


@pytest.mark.parametrize("kind", KINDS)
def test_what_training_says_of_evaluation_follows_the_quantile(kind):
    """``decided`` of a training step has the depths that evaluation takes, where no token reads another."""
    rule, x = rule_of(kind, 3)
    rule.exit_at(0.4)
    expected = through(rule, x)[1]
    rule.train()
    tokens, running, carry, steps = torch.ones(1, TOKENS, dtype=torch.bool), torch.ones(TOKENS) > 0, rule.start(x), []
    for depth in range(DEPTHS):
        alive = running
        x, carry, running, p = rule.step(x, turn(x), carry, running, depth == DEPTHS - 1)
        steps.append(Step(0, alive[None], probability=p[None]))
    every = torch.stack([each.probability for each in steps]) if isinstance(rule, PonderNet) else None
    found = rule.decided(Trace(tokens, DEPTHS, steps, distribution=every))
    assert torch.equal(sum(each.long() for each in found)[0], expected)


def cases():
    for family in FAMILIES:
        for rule in RULES:
            schedule = "cycle" if "cycle" in FAMILIES[family].schedules else FAMILIES[family].schedules[0]
            case = Case(family, schedule, rule=rule)
            if not reasons(case._replace(rule="pondernet" if rule == "loop_gate" else rule)):
                yield case


def exit_at(model, quantile):
    for stack in stacks(model):
        if stack.halting is not None:
            stack.halting.exit_at(quantile)
    return model


def depths(case, model, batch):
    return [int(trace.updates[trace.tokens].sum()) for trace in run(case, model, batch)[1]]


@pytest.mark.parametrize("case", cases(), ids=str)
def test_every_family(case):
    """Dense equals packed equals one token at a time, a sentence does not feel its batch, and a lower quantile costs less.

    A token's distribution is that of the states that it meets, and these depend on where the tokens that it reads have
    exited: of a whole model the depth may dip (that of a decoder more than its sum with the encoder, here less than 3%).
    """
    model, batch = made(case), inputs(case, (5, 3, 7))
    for quantile in (0.3, 0.7):
        exit_at(model, quantile)
        packed = check_runs(case, model, batch)
        if hasattr(model, "decoder"):
            check_steps(case, model, batch)
        one = alone(case, batch, 1)
        size = there(case, one)
        mine = run(case, model, one)[0][0]
        same(case, packed[1] if size is None else packed[1][: size.size(1)], mine)
    taken = [sum(depths(case, exit_at(model, quantile), batch)) for quantile in GRID]
    assert max(a - b for a, b in zip(taken, taken[1:])) <= 0.03 * taken[-1] and taken[0] < taken[-1]


# of one token nothing that it reads depends on the quantile: no seed may break it
WORDS = [case for case in cases() if case.family in ("shared_transformer_lm", "albert_act", "its decoder alone")]


@pytest.mark.parametrize("case", WORDS, ids=str)
@given(seed=st.integers(0, 10**6), grid=st.lists(quantiles, min_size=2, max_size=5))
@settings(max_examples=5)
def test_one_token_is_the_deeper_the_higher_the_quantile(case, seed, grid):
    model, batch = made(case, seed), inputs(case, (1,), seed)
    if "prev_output_tokens" in batch:
        batch["prev_output_tokens"] = batch["prev_output_tokens"][:, :1]
    taken = [depths(case, exit_at(model, quantile), batch) for quantile in sorted(grid)]
    assert all(a <= b for one, other in zip(taken, taken[1:]) for a, b in zip(one, other))


def test_the_flags_of_both_sides():
    def rules(**flags):
        model = built("shared_transformer", halting="act", **flags).eval()
        return [stack.halting.halts_at for stack in stacks(model)]

    assert rules() == [0.99, 0.99] and rules(exit_quantile=0.5) == [0.5, 0.5]
    assert rules(exit_quantile=0.5, decoder_exit_quantile=0.2) == [0.5, 0.2]
    assert rules(encoder_exit_quantile=0.4, halting_threshold=0.9) == [0.4, 0.9]  # training's, and evaluation's
    within = '{"threshold": 0.7}'  # the flag, which a dial sets, is the one that holds
    assert rules(halting_args=within) == [0.7, 0.7] and rules(halting_args=within, halting_threshold=0.6) == [0.6, 0.6]
    assert rules(halting_args=within, decoder_halting_threshold=0.6) == [0.7, 0.6]
    flags = flags_of("shared_transformer", {"halting": "act"})
    assert flags["exit_quantile"] is None
    model = unsettle(built("shared_transformer", halting="act")).eval()
    lower = unsettle(built("shared_transformer", halting="act", exit_quantile=0.3)).eval()
    with torch.no_grad():
        one, other = (each(**batch_of("shared_transformer"))[0] for each in (model, lower))
    assert (one - other).abs().max() > 1e-4


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"halting": "saturation"}, "rules with a distribution over depths .* saturation has not: it compares"),
        ({"decoder_halting": "margin"}, "margin has not: it compares each depth's confidence"),
        ({"decoder_halting": "patience"}, "patience has not: it counts depths that agree"),
        ({"halting": "test_after"}, "test_after has not$"),
        ({"halting": "pondernet", "halting_threshold": 0.5}, "are one knob of --halting pondernet: leave one"),
        ({"halting": "loop_gate", "halting_args": '{"threshold": 0.5}'}, "are one knob of --halting loop_gate"),
        ({"halting": "act", "exit_quantile": 0.0}, "exit.quantile .*0.0.*: .*above 0 and (up to|at most) 1"),
        ({"halting": "act", "exit_quantile": 1.5}, "exit.quantile .*1.5.*: .*above 0 and (up to|at most) 1"),
    ],
)
def test_refused(flags, message):
    with pytest.raises(UsageError, match=message):
        built("shared_transformer", **{"exit_quantile": 0.5, **flags})

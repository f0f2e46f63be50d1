"""Halting rules against loops over tokens in float64, their gradients, and what they make of odd input."""

import math

import pytest
import torch

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules import Step, Trace
from fairseq_adaptive.modules.policies import (
    ACT,
    ConfidenceExit,
    LoopGate,
    Patience,
    Place,
    StickBreaking,
    UniversalACT,
    build_policy,
)
from fairseq_adaptive.modules.policies.pondernet import PonderNet, prior_divergence, truncated_geometric

DEPTHS, TOKENS, DIM = 6, 40, 5


def transition(x):
    return torch.tanh(1.7 * x.roll(1, -1) + 0.3)


def rule_of(kind, **flags):
    torch.manual_seed(1)
    rule = kind(DIM, **flags).double()
    torch.nn.init.normal_(rule.unit.weight)
    return rule


def run(rule, x, running=None, depths=DEPTHS):
    """The result, the updates and the carry of a run over states T x C; every token is on its own."""
    running = torch.ones(x.shape[:-1], dtype=torch.bool) if running is None else running
    carry, updates, probabilities = rule.start(x), torch.zeros(x.shape[:-1]), []
    for depth in range(depths):
        updates += running
        x, carry, running, p = rule.step(x, transition(x), carry, running, depth == depths - 1)
        probabilities.append(p)
    return rule.output(x, carry), updates, carry, torch.stack(probabilities)


def act_loop(rule, x, universal):
    """One token, as the papers write it."""
    threshold, h, r, n = rule.threshold, 0.0, 0.0, 0
    accumulator = torch.zeros_like(x)
    while h < threshold and n < DEPTHS:
        y = transition(x)
        p = torch.sigmoid(rule.unit.weight[0] @ (x if universal else y) + rule.unit.bias[0])
        n += 1
        if h + p > threshold:
            r = 1 - h
            u, h = r, 1.0
        else:
            u, h = p, h + p
        accumulator = u * y + (1 - u) * accumulator
        x = y if universal else u * y + (1 - u) * x
    return accumulator if universal else x, n, r


@pytest.mark.parametrize("kind", (ACT, UniversalACT))
@pytest.mark.parametrize("bias", (-1.0, 1.0))
@torch.no_grad()
def test_act_equals_the_loop(kind, bias):
    rule = rule_of(kind, threshold=0.9, bias=bias)
    x = torch.randn(TOKENS, DIM, dtype=torch.float64)
    result, updates, carry, _ = run(rule, x)
    for token in range(TOKENS):
        expected, n, r = act_loop(rule, x[token], kind is UniversalACT)
        torch.testing.assert_close(result[token], expected)
        assert updates[token] == n
        assert float(carry["remainders"][token]) == pytest.approx(float(r), abs=1e-12)
    assert updates.min() < updates.max()


@pytest.mark.parametrize("kind", (ACT, UniversalACT, PonderNet))
def test_gradients(kind):
    """Of states and halting unit, through result, remainders and probabilities, where no decision is on the edge."""
    rule = rule_of(kind)
    x = torch.randn(4, DIM, dtype=torch.float64, requires_grad=True)

    def function(x, weight, bias):
        rule.unit.weight.data, rule.unit.bias.data = weight.data, bias.data
        del rule.unit.weight, rule.unit.bias
        rule.unit.weight, rule.unit.bias = weight, bias
        result, _, carry, probabilities = run(rule, x, depths=4)
        return result, carry.get("remainders", probabilities)

    weight, bias = (p.detach().clone().requires_grad_() for p in (rule.unit.weight, rule.unit.bias))
    assert torch.autograd.gradcheck(function, (x, weight, bias))


@pytest.mark.parametrize("kind", (ACT, UniversalACT))
def test_halted_tokens_are_frozen_and_others_do_not_matter(kind):
    rule = rule_of(kind, bias=0.5)
    x = torch.randn(TOKENS, DIM, dtype=torch.float64)
    running = torch.rand(TOKENS) > 0.3
    result, updates, carry, _ = run(rule, x, running)
    assert torch.equal(result[~running], x[~running])
    assert not updates[~running].any() and not carry["remainders"][~running].any()
    alone, counts, _, _ = run(rule, x[running])
    assert torch.equal(counts, updates[running])
    torch.testing.assert_close(alone, result[running])


def test_pondernet_trains_on_the_expectation_and_halts_at_the_median():
    rule = rule_of(PonderNet).train()
    x = torch.randn(TOKENS, DIM, dtype=torch.float64)
    expected, _, _, p = run(rule, x)
    torch.testing.assert_close(p.sum(0), torch.ones(TOKENS, dtype=torch.float64))
    for token in range(TOKENS):
        state, left, total = x[token], 1.0, 0.0
        for depth in range(DEPTHS):
            state = transition(state)
            halts = torch.sigmoid(rule.unit.weight[0] @ state + rule.unit.bias[0]) if depth < DEPTHS - 1 else 1.0
            assert float(p[depth, token]) == pytest.approx(float(left * halts))
            total, left = total + left * halts * state, left * (1 - halts)
        torch.testing.assert_close(expected[token], total)

    result, updates, _, _ = run(rule.eval(), x)
    median = 1 + (p.cumsum(0) < 0.5).sum(0)
    assert torch.equal(updates, median.float()) and updates.unique().numel() > 1
    state = x[3]
    for _ in range(int(median[3])):
        state = transition(state)
    torch.testing.assert_close(result[3], state)


def test_loop_gate_is_pondernet_with_a_uniform_prior():
    """ln N - entropy, by hand; a uniform distribution costs nothing, and a gradient pulls towards it."""
    torch.manual_seed(2)
    p = torch.rand(DEPTHS, 1, TOKENS, dtype=torch.float64).softmax(0).requires_grad_()
    tokens = torch.ones(1, TOKENS, dtype=torch.bool)
    tokens[0, 0] = False  # padding
    rule = LoopGate(DIM)
    price = rule.price(Trace(tokens, DEPTHS, distribution=p))
    by_hand = [math.log(DEPTHS) + float((p[:, 0, token] * p[:, 0, token].log()).sum()) for token in range(1, TOKENS)]
    assert float(price) == pytest.approx(sum(by_hand) / len(by_hand))
    price.backward()
    assert (p.grad[:, 0, 0] == 0).all() and (p.grad[:, 0, 1:] != 0).any()
    uniform = torch.full((DEPTHS, 1, TOKENS), 1 / DEPTHS, dtype=torch.float64)
    assert float(rule.price(Trace(tokens, DEPTHS, distribution=uniform))) == pytest.approx(0, abs=1e-12)
    assert float(rule.price(Trace(tokens, DEPTHS))) == 0


def test_stick_breaking_by_hand():
    """State, depth and price of each token by a loop; what is left of a token's probability goes to its last state."""
    torch.manual_seed(4)
    rule = rule_of(StickBreaking)
    rule.threshold = 0.8
    x = torch.randn(TOKENS, DIM, dtype=torch.float64)
    result, updates, _, p = run(rule, x)
    costs = []
    for token in range(TOKENS):
        state, left, total, cost, depth = x[token], 1.0, 0.0, 0.0, 0
        while depth < DEPTHS and 1 - left < 0.8:
            state, depth = transition(state), depth + 1
            halts = torch.sigmoid(rule.unit.weight[0] @ state + rule.unit.bias[0])
            assert float(p[depth - 1, token]) == pytest.approx(float(left * halts))
            total, cost, left = total + left * halts * state, cost + depth * float(left * halts), left * (1 - halts)
        torch.testing.assert_close(result[token], total + left * state)
        assert updates[token] == depth
        costs.append(cost + depth * float(left))
    alive = torch.arange(DEPTHS)[:, None] < updates
    steps = [Step(0, alive[depth, None], probability=p[depth, None]) for depth in range(DEPTHS)]
    price = rule.price(Trace(torch.ones(1, TOKENS, dtype=torch.bool), DEPTHS, steps))
    assert float(price) == pytest.approx(sum(costs) / TOKENS) and updates.unique().numel() > 1


def test_patience_waits_for_the_same_word():
    words = torch.tensor([[1, 2, 2, 2, 2], [3, 3, 3, 1, 1], [1, 2, 3, 4, 1], [5, 5, 2, 2, 2]])  # tokens x depths
    state = torch.zeros(4, DIM, dtype=torch.float64)
    for patience, expected in ((1, [3, 2, 5, 2]), (2, [4, 3, 5, 5])):
        depth = iter(range(5))
        rule = Patience(lambda x: torch.nn.functional.one_hot(words[:, next(depth)], 6).double(), patience).eval()
        carry, running, updates = rule.start(state), torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.long)
        for number in range(5):
            updates += running
            verdict = rule.step(state, state, carry, running, number == 4)
            carry, running = verdict.carry, verdict.running
        assert updates.tolist() == expected
    with pytest.raises(UsageError, match="asks the word scores"):
        Patience(None)
    with pytest.raises(UsageError, match="whole number of 1 or more"):
        Patience(lambda x: x, 0)


@pytest.mark.parametrize("kind", (PonderNet, LoopGate, StickBreaking))
def test_one_knob_after_training(kind):
    """The higher the threshold, the more depths a token takes: it is its distribution's quantile."""
    torch.manual_seed(5)
    rule, x = rule_of(kind).eval(), torch.randn(TOKENS, DIM, dtype=torch.float64)
    taken = []
    for threshold in (0.05, 0.2, 0.5, 0.8, 0.95, 1.0):
        rule.threshold = threshold
        taken.append(run(rule, x)[1])
    assert all((later >= earlier).all() for earlier, later in zip(taken, taken[1:]))
    assert (taken[0] < taken[-1]).any() and (taken[-1] == DEPTHS).all()


def test_prior_is_truncated_and_renormalised_and_kl_has_the_papers_direction():
    prior = truncated_geometric(0.2, 5)
    expected = torch.tensor([0.2, 0.16, 0.128, 0.1024, 0.08192], dtype=torch.float64) / 0.67232
    torch.testing.assert_close(prior, expected)
    p = torch.tensor([[0.5], [0.25], [0.25], [0.0], [0.0]], dtype=torch.float64, requires_grad=True)
    divergence = prior_divergence(p, prior)
    by_hand = sum(q * torch.log(q / r) for q, r in zip(p[:3, 0].detach(), prior))
    assert float(divergence) == pytest.approx(float(by_hand))
    divergence.sum().backward()
    assert p.grad.isfinite().all()
    assert float(prior_divergence(prior.unsqueeze(1), prior)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("kind", (ACT, UniversalACT, PonderNet))
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_half_precision_keeps_its_sums_in_float32(kind, dtype):
    """A sum of 60 probabilities of 0.015 in half precision would be off by several percent."""
    rule = kind(DIM, threshold=0.9, bias=-4.2).to(dtype)
    torch.nn.init.zeros_(rule.unit.weight)
    x = torch.randn(3, DIM).to(dtype)
    result, updates, carry, p = run(rule, x, depths=60)
    assert result.dtype == dtype and p.dtype == torch.float32
    assert all(each.dtype == torch.float32 for each in carry.values())
    if kind is not PonderNet:
        exact = 60 * torch.sigmoid(rule.unit.bias.float())
        torch.testing.assert_close(carry["halting"], exact.expand(3), rtol=1e-5, atol=0)


def test_autocast_does_not_reach_the_halting_unit():
    rule = rule_of(ACT).float()
    x = torch.randn(TOKENS, DIM)
    with torch.autocast("cpu", torch.bfloat16):
        p = rule.probability(x)
    assert p.dtype == torch.float32 and torch.equal(p, rule.probability(x))


def test_confidence_exit_halts_in_evaluation_only():
    x = torch.randn(TOKENS, DIM, dtype=torch.float64)
    rule = ConfidenceExit(0.95).eval()
    _, updates, _, cosine = run(rule, x)
    assert updates.unique().numel() > 1
    first = 1 + (cosine < 0.95).long().cumprod(0).sum(0).clamp_max(DEPTHS - 1)
    assert torch.equal(updates.long(), first)
    assert (run(rule.train(), x)[1] == DEPTHS).all()

    logits = torch.nn.Linear(DIM, 7).double()
    margin = ConfidenceExit(0.2, scores=logits).eval()
    _, _, running, p = margin.step(x, x, {}, torch.ones(TOKENS, dtype=torch.bool), False)
    best = logits(x).softmax(-1).sort(-1).values
    torch.testing.assert_close(p, best[:, -1] - best[:, -2])
    assert torch.equal(running, p < 0.2)


@pytest.mark.parametrize("threshold", (0.0, -1.0, 1.01))
@pytest.mark.parametrize("name", ("act", "ut_act", "pondernet", "saturation", "loop_gate", "stick_breaking"))
def test_refuses_impossible_thresholds(name, threshold):
    with pytest.raises(UsageError, match="above 0 and at most 1"):
        build_policy("halting", name, Place(DIM, 1), threshold=threshold)


def test_refuses_unknown_rules_and_rates():
    assert build_policy("halting", "none", Place(DIM, 1)) is None
    with pytest.raises(UsageError, match="unknown halting rule 'ponder': choose one of none, act"):
        build_policy("halting", "ponder", Place(DIM, 1))
    with pytest.raises(UsageError, match="between 0 and 1"):
        truncated_geometric(1.0, 4)

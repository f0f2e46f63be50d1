"""The one run: every router with every halting rule, every answer to what the others read, and a reader at any depth.
Dense equals packed in decisions and states, alone and in any batch; gradients reach all; what makes no sense is refused."""

import itertools
from argparse import Namespace

import pytest
import torch
from fairseq.models.transformer import TransformerConfig
from torch import nn

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules import EncoderLayer, LayerStack, recording
from fairseq_adaptive.modules.policies import Choice, MixtureOfDepths, Place, Router, Skimming, build_policy
from fairseq_adaptive.modules.policies.tape import LearnedTape
from pairwise import pairwise

DIM, DEPTHS, LENGTHS = 8, 5, (9, 1, 6, 4)
ROUTERS, RULES = ("none", "skimming", "depths", "monotone"), ("none", "act", "ut_act", "pondernet", "saturation")
CASES = [
    (router, rule)
    for router, rule in itertools.product(ROUTERS, RULES)
    if not (router in ("depths", "monotone") and rule == "saturation") and (router, rule) != ("none", "none")
]
KV = (
    [
        (router, rule, router_kv, halting_kv, unique)
        for router, rule in CASES
        for router_kv in (("active", "recompute") if router != "none" else (None,))
        for halting_kv in (("active", "recompute", "keep") if rule != "none" else (None,))
        for unique in (1, 2)
    ]
    + [("none", rule, None, "first", 1) for rule in RULES[1:]]
    + [("all_first", "none", "first", None, 1), ("all_first", "act", "first", "first", 1)]
)


def goes(case, reads):
    """Whether a reader, where there is one, goes together with what others read of tokens."""
    return not reads or not {"first", "keep"} & set(case[2:4])


class AllFirst(Router, nn.Module):
    """All tokens at the first depth, then those whose first number is above 0."""

    monotone, computes_all_first = False, True

    def choose(self, depth, x, carry, asked, sentence, protected, causal):
        run = (x[..., 0] > 0) | (depth == 0)
        return Choice(run.to(x), run.to(x))


def layer(pre, tape=0):
    args = Namespace(
        encoder_embed_dim=DIM,
        encoder_ffn_embed_dim=12,
        encoder_attention_heads=2,
        dropout=0.0,
        attention_dropout=0.0,
        activation_fn="gelu",
        encoder_normalize_before=pre,
    )
    cfg = TransformerConfig.from_namespace(args)
    cfg.tape_ffn_embed_dim = tape
    return EncoderLayer(cfg)


def router_of(name):
    if name in ("none", "all_first"):
        return AllFirst() if name != "none" else None
    if name == "skimming":
        router = Skimming(DIM, DEPTHS)
        for each in router:
            nn.init.normal_(each[1].weight), nn.init.normal_(each[4].weight)
            each[4].bias.data.copy_(torch.tensor([-0.7, 0.7]))
        return router
    router = MixtureOfDepths(DIM, DEPTHS, 0.6)
    router.monotone = name == "monotone"
    for each in router:
        nn.init.normal_(each.weight)
    return router


def make(router, rule, pre=False, unique=2, tape=0, **kv):
    torch.manual_seed(3)
    threshold = {"saturation": 0.93, "act": 0.9, "ut_act": 0.9}.get(rule)
    halting = build_policy("halting", rule, Place(DIM, DEPTHS), **({"threshold": threshold} if threshold else {}))
    schedule = tuple(depth % unique for depth in range(DEPTHS))
    layers = [layer(pre, tape) for _ in range(unique)]
    stack = LayerStack(layers, schedule, pass_depth=True, halting=halting, router=router_of(router), **kv)
    if hasattr(halting, "unit"):
        nn.init.normal_(halting.unit.weight, std=0.6), nn.init.constant_(halting.unit.bias, -1.2)
    for name, parameter in stack.named_parameters():
        if not name.startswith(("router", "halting")):
            parameter.data += 0.1 * torch.randn_like(parameter)
    return stack.double().eval()


def batch(lengths=LENGTHS, extra=2):
    torch.manual_seed(5)
    x = torch.randn(max(lengths) + extra, len(lengths), DIM, dtype=torch.float64)
    mask = torch.arange(len(x))[None] >= torch.tensor(lengths)[:, None]
    protected = torch.zeros_like(mask)
    protected[:, 0] = True
    return x, mask, protected


def tape(depth):
    torch.manual_seed(6)
    found = LearnedTape(DIM, heads=2, tokens=5, threshold=2.5, bank_size=40, mlp_dim=6, depth=depth)
    nn.init.normal_(found.reader.norm.weight, 3.0, 0.5), nn.init.normal_(found.bank.weight)
    return found.double().eval()


def both(stack, *args, **kwargs):
    outs = []
    with recording(stack) as traces:
        for packed in (False, True):
            stack.packed = packed
            outs.append(stack(*args, **kwargs))
    return outs, traces[""]


def assert_same_runs(dense, packed):
    assert torch.equal(dense.updates, packed.updates) and torch.equal(dense.tokens, packed.tokens)
    if dense.remainders is not None:
        torch.testing.assert_close(dense.remainders[dense.tokens], packed.remainders[dense.tokens], rtol=0, atol=1e-10)
    for one, other in zip(dense.steps, packed.steps):
        assert torch.equal(one.alive, other.alive)
        if one.asked is not None:
            assert torch.equal(one.asked, other.asked)


@torch.no_grad()
@pytest.mark.parametrize(
    "router, rule, router_kv, halting_kv, unique, pre", pairwise([(*case, pre) for case in KV for pre in (False, True)])
)
def test_dense_equals_packed_alone_and_in_a_batch(router, rule, router_kv, halting_kv, unique, pre):
    stack = make(router, rule, pre, unique, router_kv=router_kv, halting_kv=halting_kv)
    x, mask, protected = batch()
    outs, (dense, packed) = both(stack, x, mask, protected)
    torch.testing.assert_close(outs[0][~mask.t()], outs[1][~mask.t()], rtol=0, atol=1e-10)
    assert_same_runs(dense, packed)
    assert dense.updates[dense.tokens].unique().numel() > 1
    for kind in (False, True):
        stack.packed = kind
        for row, length in enumerate(LENGTHS):
            alone = stack(x[:length, row : row + 1], None, protected[row : row + 1, :length])
            torch.testing.assert_close(alone[:, 0], outs[0][:length, row], rtol=0, atol=1e-10)


@torch.no_grad()
def test_answers_differ_where_they_should():
    """Each answer is another model; where all tokens run, they are one."""
    x, mask, protected = batch()
    found = {
        kv: make("none", "act", unique=1, halting_kv=kv)(x, mask)[~mask.t()]
        for kv in ("recompute", "keep", "active", "first")
    }
    for one, other in itertools.combinations(found, 2):
        assert (found[one] - found[other]).abs().max() > 1e-6, (one, other)
    stacks = [make("none", "act", unique=1, halting_kv=kv) for kv in ("recompute", "keep", "active")]
    for stack in stacks:
        nn.init.constant_(stack.halting.unit.bias, -1e3)  # nobody halts
    for stack in stacks[1:]:
        torch.testing.assert_close(stack(x, mask)[~mask.t()], stacks[0](x, mask)[~mask.t()], rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("depth", (0, 1, 3))
@pytest.mark.parametrize("router, rule", [("none", "none"), *CASES])
def test_a_reader_reads_at_any_depth(router, rule, depth):
    stack, reader = make(router, rule, tape=5), tape(depth)
    x, mask, protected = batch()
    outs, (dense, packed) = both(stack, x, mask, protected, reader=reader)
    (one, wide, read), (other, *_) = outs
    torch.testing.assert_close(one[~wide.t()], other[~wide.t()], rtol=0, atol=1e-10)
    assert_same_runs(dense, packed)
    assert torch.equal(dense.tokens, ~wide) and torch.equal(wide[:, x.size(0) :], ~read.live)
    assert not any(step.alive[:, x.size(0) :].any() for step in dense.steps[:depth])
    assert router != "none" or torch.equal(dense.steps[depth].alive[:, x.size(0) :], read.live)
    assert dense.reading is not None and [step.tape.sum() for step in dense.steps[:depth]] == [0] * depth
    for packed in (False, True):
        stack.packed = packed
        for row, length in enumerate(LENGTHS):
            alone, *_, own = stack(x[:length, row : row + 1], None, protected[row : row + 1, :length], reader=reader)
            there = int(own.live.sum())
            torch.testing.assert_close(alone[:length, 0], one[:length, row], rtol=0, atol=1e-10)
            added = one[x.size(0) : x.size(0) + there, row]
            torch.testing.assert_close(alone[length : length + there, 0], added, rtol=0, atol=1e-10)


@torch.no_grad()
def test_tapes_are_of_several_lengths():
    x, mask, protected = batch()
    found = [make(*case, tape=5)(x, mask, protected, reader=tape(1))[2].live.sum(1).unique() for case in CASES]
    assert sum(len(each) > 1 for each in found) > len(CASES) // 2


@torch.no_grad()
@pytest.mark.parametrize("router, rule", CASES)
@pytest.mark.parametrize("tape_len", (0, 3))
def test_tape_tokens_that_are_there_from_the_start(router, rule, tape_len):
    stack = make(router, rule, tape=5 if tape_len else 0)
    x, mask, protected = batch()
    outs, (dense, packed) = both(stack, x, mask, protected, tape_len=tape_len)
    torch.testing.assert_close(outs[0][~mask.t()], outs[1][~mask.t()], rtol=0, atol=1e-10)
    assert_same_runs(dense, packed)


@pytest.mark.parametrize(
    "router, rule, router_kv, halting_kv, unique, reads",
    pairwise([(*case, reads) for reads in (False, True) for case in KV if goes(case, reads)]),
)
def test_gradients_reach_everything(router, rule, router_kv, halting_kv, unique, reads):
    stack = make(router, rule, unique=unique, router_kv=router_kv, halting_kv=halting_kv).train()
    x, mask, protected = batch()
    reader = tape(2).train() if reads else None
    with recording(stack) as traces:
        out = stack(x, mask, protected, reader=reader)
    out = out[0] if reads else out
    loss = out[: len(x)][~mask.t()].sin().sum()
    if stack.router is not None:
        loss = loss + stack.router.price(traces[""][0])
    loss.backward()
    for name, parameter in [*stack.named_parameters(), *(reader.named_parameters() if reads else ())]:
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("rule", ("ut_act", "pondernet"))
@pytest.mark.parametrize("router", ("skimming", "depths"))
def test_weights_of_a_token_that_is_left_out_sum_to_one(router, rule):
    """A layer that returns 1 wherever it runs: the result is 1 whatever was left out, once the state is 1."""
    stack = make(router, rule)
    x, mask, protected = batch()
    call = LayerStack.call
    try:
        LayerStack.call = lambda self, depth, x, **arguments: torch.ones_like(x)
        if rule == "pondernet":
            stack.halting.train()
        with recording(stack) as traces:
            out = stack(torch.ones_like(x), mask, protected)
    finally:
        LayerStack.call = call
    updates = traces[""][0].updates.t()
    found = out[~mask.t()] if rule == "pondernet" else out[(updates < DEPTHS) & ~mask.t()]  # at the limit ut_act stops
    torch.testing.assert_close(found, torch.ones_like(found), rtol=0, atol=1e-12)
    assert router == "skimming" or any((step.alive < ~mask).any() for step in traces[""][0].steps)


def test_pondernets_distribution_sums_to_one_under_a_router():
    stack = make("depths", "pondernet").train()
    x, mask, protected = batch()
    with recording(stack) as traces:
        stack(x, mask, protected)
    (trace,) = traces[""]
    total = trace.distribution.sum(0)[trace.tokens]
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-12)
    assert not all(step.alive[trace.tokens].all() for step in trace.steps)


@pytest.mark.parametrize(
    "case, message",
    [
        (dict(router_kv="active"), "add --router"),
        (dict(halting_kv="active"), "add --halting"),
        (dict(router="skimming", router_kv="keep"), "no keys to keep"),
        (dict(router="skimming", router_kv="first", unique=1), "a router that computes all"),
        (dict(rule="act", halting_kv="keep", unique=5), "serves several depths"),
        (dict(rule="act", halting_kv="first"), "one layer at all depths"),
        (dict(rule="act", halting_kv="last"), "at its own first one"),
        (dict(router="skimming", router_kv="last"), "at its own first one"),
        (dict(rule="act", halting_kv="all"), "choose one of recompute, keep"),
        (dict(router="all_first", rule="act", router_kv="first", unique=1), "give it to both"),
        (dict(router="depths", rule="saturation"), "choose act or margin"),
    ],
)
def test_refused(case, message):
    with pytest.raises(UsageError, match=message):
        make(case.pop("router", "none"), case.pop("rule", "none"), **case)


def test_a_reader_between_layers_is_refused_where_keys_are_kept():
    stack = make("none", "act", halting_kv="keep")
    with pytest.raises(UsageError, match="reads after the first layer"):
        stack(*batch(), reader=tape(1))


def test_plain_stacks_leave_a_trace():
    stack = make("none", "none")
    x, mask, _ = batch()
    with recording(stack) as traces:
        stack(x, mask)
    (trace,) = traces[""]
    assert [step.layer for step in trace.steps] == [0, 1, 0, 1, 0]
    assert all(torch.equal(step.alive, ~mask) and step.kind == "layer" for step in trace.steps)


@torch.no_grad()
def test_unsafe_variants_fail(monkeypatch):
    """Keys of a halted token that are never made again, and hidden tokens that are seen."""
    from fairseq_adaptive.modules.stack.packed_context import PackedContext

    x, mask, protected = batch()
    stack = make("none", "act", unique=1)
    expected = stack(x, mask)
    changed = PackedContext.changed
    monkeypatch.setattr(PackedContext, "changed", lambda self, places, state: None)
    assert (stack(x, mask) - expected)[~mask.t()].abs().max() > 1e-6
    monkeypatch.setattr(PackedContext, "changed", changed)
    stack = make("depths", "act", router_kv="active")
    expected = stack(x, mask, protected)
    monkeypatch.setattr(PackedContext, "hide", lambda self, places: None)
    assert (stack(x, mask, protected) - expected)[~mask.t()].abs().max() > 1e-6


@pytest.mark.parametrize("autocast", (False, True), ids=("bf16", "autocast"))
@pytest.mark.parametrize("router, rule", CASES)
def test_half_precision(router, rule, autocast):
    """A model in bfloat16, and one under autocast: both runs work, and training has finite gradients."""
    dtype = torch.float32 if autocast else torch.bfloat16
    stack = make(router, rule, router_kv=None if router == "none" else "recompute").to(dtype)
    x, mask, protected = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        with torch.no_grad():
            outs, _ = both(stack, x.to(dtype), mask, protected)
        assert all(out.dtype == dtype and out[~mask.t()].isfinite().all() for out in outs)
        stack.packed = None
        stack.train()(x.to(dtype), mask, protected)[~mask.t()].float().sin().sum().backward()
    assert all(each.grad is None or each.grad.isfinite().all() for each in stack.parameters())

"""A rule that is asked after some blocks of a Transformer-XL only: what it halts are layers."""

import pytest
import torch

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules.policies.pondernet import truncated_geometric
from fairseq_adaptive.modules.stack.trace import recording
from fairseq_adaptive.ops.halting_update import naive
from models.test_halting_transformer_xl import RULES, SHAPES, THRESHOLD, make, run, segments
from models.test_routing_transformer_xl import MOD, make as make_routed, seen_of

CASES = [(rule, number, after) for rule in RULES for number, after in ((0, "f"), (2, "f"), (4, "a"))]
CASES += [("act", 1, "f"), ("act", 7, "f"), ("pondernet", 3, "a")]


def same(model, seed, rule):
    parts = segments(seed)
    (a, am, at), (b, bm, bt), (c, *_) = (
        run(model, parts, packed, gradients) for packed, gradients in ((False, False), (True, False), (False, True))
    )
    for part, x, y, z in zip(parts, a, b, c):
        there = part.ne(1)
        torch.testing.assert_close(x[there], y[there], rtol=0, atol=1e-10)
        torch.testing.assert_close(x[there], z[there], rtol=0, atol=1e-10)
    for x, y in zip(*(seen_of(memory, len(model.decoder.blocks)) for memory in (am, bm)), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-10)
    for x, y in zip(at, bt):
        assert torch.equal(x.updates, y.updates) and torch.equal(x.histogram(), y.histogram())
        for s, t in zip(x.steps, y.steps):
            assert torch.equal(s.alive, t.alive) and s.counts == t.counts and (s.halted is None) == (not s.counts)
    return at


@pytest.mark.parametrize("rule, number, after", CASES)
def test_dense_equals_packed(build, rule, number, after):
    model = make(build, rule, 1, **SHAPES[number], halting_after=after)
    kinds = [block.kind for block in model.decoder.blocks]
    asked = {depth for depth, kind in enumerate(kinds) if kind == after} | {len(kinds) - 1}
    for trace in same(model, 1, rule):
        assert [step.counts for step in trace.steps] == [depth in asked for depth in range(len(trace.steps))]
        assert trace.most == len(asked) and trace.updates.max() <= len(asked)
        assert len(trace.histogram()) == len(asked)


@pytest.mark.parametrize("kv", ("active", "recompute"))
@pytest.mark.parametrize("rule", ("act", "ut_act", "pondernet"))
def test_with_a_router(build, rule, kv):
    """A token that is left out of the block after which the rule is asked is not asked, and keeps its state."""
    same(make_routed(build, ("cycle", MOD, kv, rule), 1, halting_after="f"), 1, rule)


def test_act_of_layers(build):
    """By hand: layers of two blocks, each of which the rule blends as one."""
    model = make(build, "act", 0, halting_after="f")
    stack, tokens = model.decoder.blocks, torch.randint(4, 44, (2, 6))
    with torch.no_grad(), recording(model) as traces:
        found = model.decoder(tokens, features_only=True)[0]
        x = model.decoder.embed_tokens(tokens)
        zeros = torch.zeros(2, 6, dtype=torch.float64)
        sums, rest, running, updates = zeros, zeros, torch.ones(2, 6, dtype=torch.bool), zeros
        for layer in range(4):
            held = torch.where(running.unsqueeze(-1), stack[2 * layer](x, model.decoder.positions), x)
            y, unit = stack[2 * layer + 1](held), stack.halting.unit
            updates = updates + running
            made = naive.halting_update(x, y, unit.weight[0], unit.bias, sums, rest, running, THRESHOLD["act"])
            x, sums, rest, running = made.state, made.halting, made.remainders, made.running
    torch.testing.assert_close(found, x, rtol=0, atol=1e-12)
    (trace,) = traces["decoder.blocks"]
    assert torch.equal(trace.updates, updates.long()) and len(set(updates.flatten().tolist())) > 1
    torch.testing.assert_close(trace.ponder_cost(), updates.sum() + rest.sum(), check_dtype=False)


def test_pondernet_is_a_distribution_over_layers(build):
    model = make(build, "pondernet", 0, halting_after="f").train()
    model.decoder.blocks.every_depth = True
    tokens = torch.randint(4, 44, (2, 6))
    with recording(model) as traces:
        out = model.decoder(tokens, features_only=True)[0]
    (trace,) = traces["decoder.blocks"]
    assert trace.distribution.shape == (4, 2, 6) and out.shape == (8, 6, 16)
    torch.testing.assert_close(trace.distribution.sum(0), torch.ones(2, 6, dtype=torch.float64))
    assert trace.updates.max() <= 4 and len(trace.histogram()) == 4
    log = trace.distribution.log() - truncated_geometric(0.2, 4).log()[:, None, None]
    expected = (trace.distribution * log).sum(0).mean()
    torch.testing.assert_close(model.decoder.blocks.halting.price(trace), expected)


@pytest.mark.parametrize("after", ("a", "f"))
@pytest.mark.parametrize("rule", ("act", "ut_act"))
def test_gradients_reach_everything(build, rule, after):
    model = make(build, rule, 0, halting_after=after).train()
    with recording(model) as traces:
        loss = model(torch.randint(4, 44, (2, 9)))[0].sin().sum()
    rule = model.decoder.blocks.halting
    (loss + rule.price(traces["decoder.blocks"][0]) + rule.lever(traces["decoder.blocks"][0])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("layout", ("a*3", "f*3", "fa*2", "a", "f"))
def test_any_layout(build, layout):
    for after in ("a", "f"):
        options = {"layout": layout, "decoder_unique_layers": None, "halting_after": after}
        same(make(build, "act", 0, **options), 0, "act")


def test_a_rule_is_needed(build):
    with pytest.raises(UsageError, match="add --halting"):
        build("par_transformer_xl", layout="af", halting_after="f", decoder_embed_dim=16, decoder_attention_heads=2)

"""Routers in a Transformer-XL: dense = packed, segments and single steps = the whole, memories, over layouts, sharing and
rules."""

import pytest
import torch

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules.stack.trace import recording
from fairseq_adaptive.modules.transformer_xl.cache import KeyValueCache
from fairseq_adaptive.modules.transformer_xl.memory import SegmentMemory
from models.test_halting_transformer_xl import THRESHOLD, TINY, segments

MIDDLE = {"layer_sharing": "middle_cycle", "layout": "af*4", "decoder_unique_layers": 4}
SHAPES = {
    "cycle": {},
    "reversed": {"layer_sharing": "cycle_rev", "layout": "affa*2"},
    "unshared": {"decoder_unique_layers": None, "layout": "afff,fa,f", "decoder_normalize_before": True},
    "window": {"memory_length": 5, "same_length": True, "clamp_length": 3},
    "forgetful": {"memory_length": 0},
    "middle": MIDDLE,
}
MOD = {"router": "mixture_of_depths", "router_args": '{"every": 1}'}
EVERY_OTHER = {"router": "mixture_of_depths", "router_args": '{"every": 2, "predictor": true, "weighting": "score"}'}
MOR = {"router": "mixture_of_recursions", "router_args": '{"alpha": 1.0}'}
CASES = [
    *((shape, MOD, kv, None) for shape in SHAPES for kv in ("active", "recompute")),
    *((shape, {"router": "skimming"}, kv, None) for shape in ("reversed", "window") for kv in ("active", "recompute")),
    *(("middle", MOR, kv, None) for kv in ("active", "recompute", "first")),
    *(("middle", {"router": "token_choice"}, kv, None) for kv in ("active", "first")),
    *((shape, MOR, "first", None) for shape in ("cycle", "window")),
    *((shape, EVERY_OTHER, None, rule) for shape in ("window", "unshared") for rule in ("act", "pondernet")),
    *(("cycle", MOD, kv, rule) for kv in ("active", "recompute") for rule in ("ut_act", "margin")),
    *(("unshared", {"router": "skimming"}, kv, "act") for kv in ("active", "recompute")),
    ("reversed", {"router": "skimming", "halting_kv": "active"}, "recompute", "act"),
    ("cycle", {"halting_kv": "active"}, None, "act"),
    ("window", {"halting_kv": "active"}, None, "saturation"),
]

# the others run with --runslow or without -m "not slow"
FEW = CASES[0:1] + CASES[7:8] + CASES[14:18] + CASES[21:23] + CASES[-3:-1]


def few(cases=CASES):
    return [case if case in FEW else pytest.param(case, marks=pytest.mark.slow) for case in cases]


def name(case):
    shape, policies, kv, rule = case
    words = shape, policies.get("router"), kv, rule, policies.get("halting_kv")
    return "-".join(each for each in words if each)


def make(build, case, seed=0, **more):
    shape, policies, kv, rule = case
    torch.manual_seed(seed)
    flags = {**TINY, **SHAPES[shape], **policies, **more}
    flags.update({"router_kv": kv} if kv else {})
    flags.update({"halting": rule, "halting_threshold": THRESHOLD[rule]} if rule else {})
    model = build("par_transformer_xl", **flags)
    for key, parameter in model.named_parameters():
        parameter.data += (0.3 if "blocks" in key else 0.1) * torch.randn_like(parameter)
    stack = model.decoder.blocks
    if rule and hasattr(stack.halting, "unit"):
        torch.nn.init.normal_(stack.halting.unit.weight, std=0.5)
        torch.nn.init.constant_(stack.halting.unit.bias, -1.2)
    if policies.get("router") == "skimming":
        for predictor in stack.router:
            predictor[-1].weight.data.normal_()
            predictor[-1].bias.data.copy_(torch.tensor([-0.7, 0.7]))
    return model.double().eval()


def run(model, parts, packed, gradients=False, memory=None):
    model.decoder.blocks.packed = packed
    memory, outs = memory or SegmentMemory(), []
    with torch.set_grad_enabled(gradients), recording(model) as traces:
        for part in parts:
            outs.append(model.decoder(part, memory=memory, features_only=True)[0].detach())
    return outs, memory, traces["decoder.blocks"]


def seen_of(memory, depths):
    """What a memory holds of the positions that are seen, per depth."""
    states = memory.states or []
    for state, seen in zip(states[:depths], states[depths:] or [None] * depths):
        if isinstance(state, KeyValueCache) and state.keys is not None:
            seen = torch.ones(state.keys.size(0), len(state)) if state.visible is None else state.visible
            for each in (state.keys, state.values):
                yield each.transpose(1, 2)[seen > 0]
        elif isinstance(state, torch.Tensor):
            yield state if seen is None else state[seen]


@pytest.mark.parametrize("case", CASES, ids=name)
def test_dense_equals_packed(build, case):
    for seed in range(2):
        model = make(build, case, seed)
        parts, depths = segments(seed), len(model.decoder.blocks)
        (a, am, at), (b, bm, bt) = (run(model, parts, packed) for packed in (False, True))
        c, cm, _ = run(model, parts, False, gradients=True)  # a memory of inputs
        begun = run(model, parts[:2], False, gradients=True)[1]
        d, dm, _ = run(model, parts[2:], True, memory=begun)  # begun so, and packed
        for part, x, y, z in zip(parts, a, b, c):
            there = part.ne(1)
            torch.testing.assert_close(x[there], y[there], rtol=0, atol=1e-10)
            torch.testing.assert_close(x[there], z[there], rtol=0, atol=1e-10)
        for part, x, y in zip(parts[2:], a[2:], d):
            torch.testing.assert_close(x[part.ne(1)], y[part.ne(1)], rtol=0, atol=1e-10)
        for one, other in ((am, bm), (cm, dm)):
            one, other = (list(seen_of(each, depths)) for each in (one, other))
            assert len(one) == len(other)
            for x, y in zip(one, other):
                torch.testing.assert_close(x, y, rtol=0, atol=1e-10)
        for x, y in zip(at, bt):
            assert torch.equal(x.updates, y.updates)
            for s, t in zip(x.steps, y.steps):
                assert torch.equal(s.alive, t.alive) and s.kind == t.kind and s.layer == t.layer
            if x.remainders is not None:
                torch.testing.assert_close(x.remainders[x.tokens], y.remainders[y.tokens], rtol=0, atol=1e-10)
        computed = torch.cat([trace.updates[trace.tokens] for trace in at])
        assert 0 < computed.sum() < depths * computed.numel()


@pytest.mark.parametrize("case", few(), ids=name)
def test_rows_do_not_see_each_other(build, case):
    model, parts = make(build, case, 1), segments(1)
    for packed in (False, True):
        whole = run(model, parts, packed)[0]
        for row in range(3):
            length = int(parts[-1][row].ne(1).sum())
            alone = [part[row : row + 1] for part in parts[:-1]] + [parts[-1][row : row + 1, :length]]
            for x, y in zip(run(model, alone, packed)[0], whole):
                torch.testing.assert_close(x[0], y[row, : x.size(1)], rtol=0, atol=1e-10)


@pytest.mark.parametrize("case", few([case for case in CASES if case[0] != "forgetful"]), ids=name)
def test_segments_and_single_steps_equal_the_whole(build, case):
    """Choices are causal, and memories say who was hidden."""
    model = make(build, case, 2)
    tokens = torch.cat(segments(2, lengths=[5, 4, 9]), 1)
    tokens[tokens == 1] = 7
    whole = run(model, [tokens], True)[0][0]
    for lengths in ([7, 7, 4], [1] * 18, [17, 1]):
        for packed in (False, True):
            parts = torch.cat(run(model, tokens.split(lengths, 1), packed)[0], 1)
            torch.testing.assert_close(parts, whole, rtol=0, atol=1e-10)
    order = torch.tensor([2, 0, 0, 1])
    for packed in (False, True):
        model.decoder.blocks.packed = packed
        state = {}
        with torch.no_grad():
            for end in range(3, 11):  # a prefix of three
                step = model.decoder(tokens[:, :end], incremental_state=state, features_only=True)[0]
                torch.testing.assert_close(step[:, -1], whole[:, end - 1], rtol=0, atol=1e-10)
            model.decoder.reorder_incremental_state_scripting(state, order)
            step = model.decoder(tokens[order, :11], incremental_state=state, features_only=True)[0]
            torch.testing.assert_close(step[:, 0], whole[order, 10], rtol=0, atol=1e-10)


def test_a_hidden_token_has_no_influence_on_later_segments(build):
    """And would have one if memories did not say that it was hidden."""
    case = ("unshared", MOD, "active", None)
    model, parts = make(build, case), segments(0, lengths=[4, 3])
    outs, memory, traces = run(model, parts[:1], False, gradients=True)
    expected = run(model, parts[1:], False, gradients=True, memory=memory)[0][0]
    again = run(model, parts[:1], False, gradients=True)[1]
    depths, hidden = len(model.decoder.blocks), 0
    for state, seen in zip(again.states[:depths], again.states[depths:]):
        if seen is not None:
            hidden += int((~seen).sum())
            state[~seen] += 10
    assert hidden
    torch.testing.assert_close(run(model, parts[1:], False, True, again)[0][0], expected, rtol=0, atol=1e-10)
    again = run(model, parts[:1], False, gradients=True)[1]
    again.states = again.states[:depths]
    assert not torch.allclose(run(model, parts[1:], False, True, again)[0][0], expected)


@pytest.mark.parametrize("case", few(), ids=name)
def test_gradients_reach_everything(build, case):
    model = make(build, case).train()
    memory = SegmentMemory()
    for part in segments(0, lengths=[9, 7, 9, 8]):
        with recording(model) as traces:
            model(part, memory=memory)[0].sin().sum().backward()
        for policy in (model.decoder.blocks.router, model.decoder.blocks.halting):
            price = None if policy is None else policy.price(traces["decoder.blocks"][0])
            if price is not None and price.requires_grad:
                model(part)[0].sin().sum().backward()
    missing = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not [key for key in missing if "predictors" not in key], missing


def test_skimming_learns_from_what_the_others_read(build):
    """A choice has a gradient through the attention of later tokens, also where the token itself is not in the loss."""
    model = make(build, ("unshared", {"router": "skimming"}, "active", None)).train()
    out = model(torch.randint(4, 44, (2, 6)))[0][:, -1]
    out.sin().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.decoder.blocks.router[2].parameters())


def test_the_shared_cache_remembers_once_a_layer(build):
    case = ("middle", MOR, "first", None)
    for gradients in (False, True):
        memory = run(make(build, case), segments(0), False, gradients)[1]
        kept = [
            state is not None and (not isinstance(state, KeyValueCache) or len(state) > 0) for state in memory.states
        ]
        assert kept == [True, False, True, False, False, False, False, False][: len(kept)] or sum(kept) == 2


@pytest.mark.parametrize(
    "options, message",
    [
        ({"router": "skimming", "decoder_layerdrop": 0.1}, "leave out --decoder-layerdrop"),
        ({"router": "skimming", "router_kv": "keep"}, "no keys to keep"),
        ({"router": "skimming", "router_kv": "first"}, "computes all tokens at the first repeat"),
        ({"halting": "act", "halting_kv": "keep"}, "memory of a Transformer-XL"),
        ({"router": "mixture_of_depths", "halting": "saturation"}, "how far"),
        ({"reader": "tape"}, "--reader is for encoders"),
    ],
)
def test_refused(build, options, message):
    with pytest.raises(UsageError, match=message):
        build("par_transformer_xl", **{**TINY, **options})


def test_attention_that_is_not_known_cannot_hide(build):
    model = make(build, ("cycle", MOD, "active", None))

    class Other(type(model.decoder.blocks[0].attention)):
        pass

    model.decoder.blocks[0].attention.__class__ = Other
    with torch.no_grad(), pytest.raises(UsageError, match="choose recompute"):
        model(torch.randint(4, 44, (2, 6)))
    model = make(build, ("cycle", MOD, "recompute", None))
    text = torch.randint(4, 44, (2, 6))
    with torch.no_grad():
        expected = model(text)[0]
        model.decoder.blocks[0].attention.__class__ = Other
        torch.testing.assert_close(model(text)[0], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kv", ("active", "recompute"))
def test_a_supernet_takes_a_router(build, kv):
    options = {key: value for key, value in TINY.items() if key not in ("layout", "decoder_unique_layers")}
    model = build("par_supernet", **options, blocks=4, temperature_updates=10, router="mixture_of_depths", router_kv=kv)
    model.decoder.architecture.data.normal_()
    for parameter in model.decoder.blocks.router.parameters():
        parameter.data.normal_()
    parts = segments(3)
    (a, _, at), (b, *_) = (run(model, parts, packed) for packed in (False, True))
    for part, x, y in zip(parts, a, b):
        torch.testing.assert_close(x[part.ne(1)], y[part.ne(1)], rtol=0, atol=1e-10)
    assert at[0].steps[0].kind == "mixture"


def test_compute_is_counted_by_blocks(build):
    """By hand, for a layout that begins with each kind: maps, distances once a batch, and scores of all places."""
    from fairseq_adaptive.modules.stack.compute import stack_macs

    for layout in ("fa", "af"):
        model = build(
            "par_transformer_xl",
            **{**TINY, "layout": layout, "decoder_unique_layers": None},
            router="mixture_of_depths",
        )
        with torch.no_grad(), recording(model) as traces:
            model(torch.randint(4, 44, (2, 6)))
        (trace,) = traces["decoder.blocks"]
        expected = dense = 0
        for kind, step in zip(layout, trace.steps):
            for computed, count in ((True, step.alive.sum(1).double()), (False, torch.full((2,), 6.0).double())):
                macs = 2 * 16 * 32 * count if kind == "f" else 4 * 16 * 16 * count + 16 * count * (3 * 6 + 1)
                total = macs.sum() + (16 * 16 * 7 if kind == "a" else 0)
                expected, dense = (expected + total, dense) if computed else (expected, dense + total)
        expected += 2 * 2 * 6 * 16  # the router
        assert [float(each) for each in stack_macs(model.decoder.blocks, trace)] == [float(expected), float(dense)]

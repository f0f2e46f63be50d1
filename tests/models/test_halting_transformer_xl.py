"""PAR Transformer-XL on a stack: sharing, halting, LayerDrop."""

import itertools
import random

import pytest
import torch

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules.transformer_xl import segments as segments_module
from fairseq_adaptive.modules.transformer_xl.memory import SegmentMemory
from fairseq_adaptive.modules.transformer_xl.relative_attention import KeyValueCache
from fairseq_adaptive.modules.stack.trace import recording
from pairwise import pairwise

TINY = {
    "decoder_embed_dim": 16,
    "decoder_ffn_embed_dim": 32,
    "decoder_attention_heads": 2,
    "memory_length": 64,
    "layout": "af*4",
    "dropout": 0.0,
    "decoder_unique_layers": 4,
}
SHAPES = [
    {},
    {"layer_sharing": "cycle_rev", "layout": "affa*2"},
    {"decoder_unique_layers": None, "layout": "afff,fa,f"},
    {"decoder_normalize_before": True, "untie_relative_bias": True},
    {"memory_length": 5, "same_length": True, "clamp_length": 3},
    {"memory_length": 0},
    {"memory_length": 4, "decoder_head_dim": 5},
    {
        "adaptive_softmax_cutoff": "10,30",
        "share_decoder_input_output_embed": True,
        "tie_adaptive_proj": True,
        "decoder_normalize_before": True,
        "memory_length": 7,
    },
]
RULES = ("act", "ut_act", "pondernet", "saturation", "margin")
THRESHOLD = {"act": 0.9, "ut_act": 0.9, "saturation": 0.8, "pondernet": 0.5, "margin": 0.02}


def make(build, rule, seed, **options):
    torch.manual_seed(seed)
    model = build("par_transformer_xl", **{**TINY, **options}, halting=rule, halting_threshold=THRESHOLD[rule])
    for name, parameter in model.named_parameters():
        parameter.data += (0.3 if "blocks" in name else 0.1) * torch.randn_like(parameter)
    unit = getattr(model.decoder.blocks.halting, "unit", None)
    if unit is not None:
        torch.nn.init.normal_(unit.weight, std=0.5)
        torch.nn.init.constant_(unit.bias, -1.2)
    return model.double().eval()


def segments(seed, batch=3, lengths=None):
    torch.manual_seed(seed)
    rng = random.Random(seed)
    lengths = lengths or [rng.choice([1, 2, 5, 9]) for _ in range(4)]
    tokens = [torch.randint(4, 44, (batch, length)) for length in lengths]
    last = tokens[-1]
    for row in range(batch):
        last[row, rng.randint(1, last.size(1)) :] = 1
    return tokens


def run(model, parts, packed, gradients=False, memory=None):
    model.decoder.blocks.packed = packed
    memory, outs = memory or SegmentMemory(), []
    with torch.set_grad_enabled(gradients), recording(model) as traces:
        for part in parts:
            outs.append(model.decoder(part, memory=memory, features_only=True)[0].detach())
    return outs, memory, traces["decoder.blocks"]


def past(state):
    return (state.keys, state.values) if isinstance(state, KeyValueCache) else (state,)


CASES = [
    (rule, number) for rule, number in itertools.product(RULES, range(len(SHAPES))) if (rule, number) != ("margin", 7)
]


@pytest.mark.parametrize("rule, number, seed", pairwise([(*case, seed) for case in CASES for seed in range(4)]))
def test_dense_equals_packed(build, rule, number, seed):
    model = make(build, rule, seed, **SHAPES[number])
    parts = segments(seed)
    (a, am, at), (b, bm, bt) = (run(model, parts, packed) for packed in (False, True))
    (c, cm, ct) = run(model, parts, False, gradients=True)  # a memory of inputs
    d, dm, dt = run(
        model, parts[2:], True, memory=run(model, parts[:2], False, gradients=True)[1]
    )  # begun so, and packed
    for part, x, y, z in zip(parts, a, b, c):
        there = part.ne(1)
        torch.testing.assert_close(x[there], y[there], rtol=0, atol=1e-10)
        torch.testing.assert_close(x[there], z[there], rtol=0, atol=1e-10)
    for part, x, y in zip(parts[2:], a[2:], d):
        torch.testing.assert_close(x[part.ne(1)], y[part.ne(1)], rtol=0, atol=1e-10)
    for x, y in zip(am.states or [], bm.states or []):
        for u, v in zip(past(x), past(y)):
            if u is not None:
                torch.testing.assert_close(u, v, rtol=0, atol=1e-10)
    for x, y in zip(cm.states or [], dm.states or []):
        for u, v in zip(past(x), past(y)):
            if u is not None:
                torch.testing.assert_close(u, v, rtol=0, atol=1e-10)
    for x, y in zip(at, bt):
        assert torch.equal(x.updates, y.updates)
        for s, t in zip(x.steps, y.steps):
            assert torch.equal(s.alive, t.alive) and s.kind == t.kind == model.decoder.blocks[0].step_kind or True
            assert s.kind == t.kind and s.layer == t.layer
        if x.remainders is not None:
            torch.testing.assert_close(x.remainders[x.tokens], y.remainders[y.tokens], rtol=0, atol=1e-10)
    kinds = [model.decoder.blocks[depth].step_kind for depth in range(len(model.decoder.blocks))]
    assert all([s.kind for s in x.steps] == kinds[: len(x.steps)] for x in at)


def test_tokens_do_halt_at_different_depths(build):
    for rule in RULES:
        counts = set()
        for seed in range(4):
            traces = run(make(build, rule, seed), segments(seed), True)[2]
            counts |= set(torch.cat([trace.updates[trace.tokens] for trace in traces]).tolist())
        print(rule, sorted(counts))
        assert len(counts) > 2, (rule, counts)


@pytest.mark.parametrize("rule, number", CASES)
def test_rows_do_not_see_each_other(build, rule, number):
    model = make(build, rule, 1, **SHAPES[number])
    parts = segments(1)
    for packed in (False, True):
        whole = run(model, parts, packed)[0]
        for row in range(3):
            length = int(parts[-1][row].ne(1).sum())
            alone = [part[row : row + 1] for part in parts[:-1]] + [parts[-1][row : row + 1, :length]]
            for x, y in zip(run(model, alone, packed)[0], whole):
                torch.testing.assert_close(x[0], y[row, : x.size(1)], rtol=0, atol=1e-10)


# with a shorter memory, segments are not the whole
@pytest.mark.parametrize(
    "rule, number", [case for case in CASES if SHAPES[case[1]].get("memory_length", 64) in (64, 5)]
)
def test_segments_and_single_steps_equal_the_whole(build, rule, number):
    model = make(build, rule, 2, **SHAPES[number])
    tokens = torch.cat([part for part in segments(2, lengths=[5, 4, 9])], 1)
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


def test_sharing_equals_the_unshared_model(build):
    shared = build("par_transformer_xl", **TINY)
    unshared = build("par_transformer_xl", **{**TINY, "decoder_unique_layers": None})
    weights = shared.state_dict()
    for name in list(weights):
        for depth in range(4, 8):
            if f".blocks.{depth - 4}." in name:
                weights[name.replace(f".blocks.{depth - 4}.", f".blocks.{depth}.")] = weights[name]
    unshared.load_state_dict(weights)
    assert {n.split(".")[2] for n in shared.state_dict() if ".blocks." in n} == set("0123")
    folded = unshared.state_dict()
    shared.upgrade_state_dict(folded)
    shared.load_state_dict(folded)
    memories = SegmentMemory(), SegmentMemory()
    for part in segments(3):
        x, y = (m.train()(part, memory=memory)[0] for m, memory in zip((shared, unshared), memories))
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)
    assert [s is None for s in memories[0].states] == [False, True] * 4
    assert not torch.equal(memories[0].states[0], memories[0].states[4])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"layer_sharing": "sequence"}, "layer 0 cannot serve depth 0 .attention. and depth 1 .feed-forward."),
        ({"decoder_unique_layers": 3}, "layer 0 cannot serve"),
        ({"layer_sharing": "cycle_rev"}, "cannot serve"),
        ({"halting": "act", "decoder_layerdrop": 0.1}, "leave out --decoder-layerdrop"),
        ({"halting": "margin", "adaptive_softmax_cutoff": "10,30"}, "margin"),
    ],
)
def test_refused(build, options, message):
    with pytest.raises(UsageError, match=message):
        build("par_transformer_xl", **{**TINY, **options})


@pytest.mark.parametrize("drop", (0.5, 1.0))
def test_layerdrop(build, drop):
    model = build("par_transformer_xl", **TINY, decoder_layerdrop=0.5).train()
    model.decoder.blocks.layerdrop = drop  # also of all depths, which no flag asks for
    memory = SegmentMemory()
    torch.manual_seed(0)
    with recording(model) as traces:
        for index, part in enumerate(segments(4, lengths=[3, 4, 5, 2])):
            model(part, memory=memory)[0].sum().backward()
            lengths = {s.size(1) for s in memory.states if s is not None}
            assert len(lengths) == 1 and [s is None for s in memory.states] == [False, True] * 4
    ran = [len(t.steps) for t in traces["decoder.blocks"]]
    assert max(ran) < 8
    model.eval()
    with recording(model) as traces, torch.no_grad():
        model(part)
    assert len(traces["decoder.blocks"][0].steps) == 8


@pytest.mark.parametrize("rule", ("act", "ut_act", "pondernet"))
def test_gradients_reach_everything(build, rule):
    model = make(build, rule, 0).train()
    memory = SegmentMemory()
    for part in segments(0):
        model.zero_grad()
        with recording(model):
            model(part, memory=memory)[0].sin().sum().backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not missing, missing


@pytest.mark.parametrize("sample", (False, True))
@pytest.mark.parametrize("rule", ("act", "pondernet", "saturation"))
def test_a_supernet_halts(build, rule, sample):
    options = {k: v for k, v in TINY.items() if k not in ("layout", "decoder_unique_layers")}
    model = build(
        "par_supernet",
        **options,
        blocks=5,
        temperature_updates=10,
        sample_paths=sample,
        halting=rule,
        halting_threshold=THRESHOLD[rule],
    )
    model.decoder.architecture.data.normal_()
    unit = getattr(model.decoder.blocks.halting, "unit", None)
    if unit is not None:
        torch.nn.init.normal_(unit.weight, std=0.5)
        torch.nn.init.constant_(unit.bias, -1.2)
    for seed in range(3):
        parts = segments(seed)
        (a, am, at), (b, bm, bt) = (run(model, parts, packed) for packed in (False, True))
        for part, x, y in zip(parts, a, b):
            torch.testing.assert_close(x[part.ne(1)], y[part.ne(1)], rtol=0, atol=1e-10)
        assert all(torch.equal(x.updates, y.updates) for x, y in zip(at, bt)) and at[0].steps[0].kind == "mixture"


@pytest.mark.parametrize("rule", ("act", "ut_act", "pondernet"))
def test_one_token_runs_blocks_until_all_are_done_and_packs_nothing(build, rule, monkeypatch):
    model = make(build, rule, 0)
    text, ran, state = torch.randint(4, 44, (1, 12)), [], {}
    whole = run(model, [text], False)
    model.decoder.blocks.packed = None
    for name in ("run_dense", "run_packed"):
        monkeypatch.setattr(segments_module, name, None)
    for number in range(4):
        model.decoder.blocks.layer(number).register_forward_pre_hook(lambda *_: ran.append(1))
    with torch.no_grad():
        for end in range(1, 13):
            ran.clear()
            step = model.decoder(text[:, :end], incremental_state=state, features_only=True)[0]
            torch.testing.assert_close(step[:, 0], whole[0][0][:, end - 1], rtol=0, atol=1e-10)
            assert len(ran) == whole[2][0].updates[0, end - 1]
    assert whole[2][0].updates.min() < 8

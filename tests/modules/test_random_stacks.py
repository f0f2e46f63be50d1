"""500 random stacks: layers and schedule, router, rule and reader with their options, answers, shapes, padding on either
side, protected tokens. Whatever the pairing allows, dense equals packed; and of each one more is tried: a sentence alone,
the single steps of a decoder, or a training step, which gives all parameters a finite gradient."""

import itertools
from argparse import Namespace
from typing import NamedTuple, Optional

import torch
from fairseq.models.transformer import TransformerConfig
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules import (
    STRATEGIES,
    DecoderLayer,
    DecoderStack,
    EncoderLayer,
    ForeignStack,
    LayerStack,
    layer_schedule,
    recording,
)
from fairseq_adaptive.modules.policies import Place, build_policy
from fairseq_adaptive.modules.policies.pairing import ANSWERS, check_pairing

DIM, WORDS = 8, 11
ROUTERS = {
    "none": {},
    "skimming": {"bias": [0.0, 1.0], "noise": [0.0, 1.0]},
    "mixture_of_depths": {
        "capacity": [0.2, 0.5, "75%", 1.0],
        "every": [1, 2],
        "weighting": ["score", "sigmoid"],
        "predictor": [False, True],
    },
    "mixture_of_recursions": {
        "gate": ["sigmoid", "tanh", "none"],
        "alpha": [0.1, 1.0],
        "warmup": [0, 5],
        "threshold": [0.3, 0.5],
        "auxiliary": [False, True],
        "mlp": [False, True],
    },
    "token_choice": {
        "function": ["softmax", "sigmoid"],
        "alpha": [0.5, 1.0],
        "balance": ["loss", "bias"],
        "warmup": [0, 5],
        "mlp": [False, True],
    },
    "token_merging": {"share": [0.0, 0.2, 0.5]},
}
RULES = {
    "none": {},
    "act": {"threshold": [0.5, 0.99]},
    "ut_act": {"threshold": [0.5, 0.99]},
    "pondernet": {"threshold": [0.5, 0.9], "prior_rate": [0.2, 0.5]},
    "saturation": {"threshold": [0.7, 0.95]},
    "margin": {"threshold": [0.02, 0.2]},
}
READERS = {
    "none": {},
    "tape": {
        "tokens": [2, 4],
        "threshold": [1.0, 2.0],
        "query": ["mean", "first"],
        "cost": ["entropy", "max"],
        "mlp_dim": [0, 6],
    },
}


class Spec(NamedTuple):
    """A stack, and a batch for it; ``lengths`` are those of its sentences, ``then`` is what is tried beside its runs."""

    kind: str
    schedule: tuple
    pre_norm: bool
    router: str
    router_args: dict
    rule: str
    rule_args: dict
    router_kv: Optional[str]
    halting_kv: Optional[str]
    reader: str
    reader_args: dict
    lengths: tuple
    left: bool
    protected: bool
    source: bool
    then: str
    seed: int


def _try(call, *args, **kwargs):
    try:
        return call(*args, **kwargs)
    except UsageError:
        return None


def schedules():
    """All of up to five depths that a stack takes."""
    found = (
        _try(layer_schedule, strategy, unique, depths)
        for strategy in STRATEGIES
        for depths in range(1, 6)
        for unique in range(1, depths + 1)
    )
    return sorted({each for each in found if each is not None and len(set(each)) == max(each) + 1})


def scores(states):
    """Logits of words, as a decoder has them."""
    return states @ torch.randn(DIM, WORDS, dtype=states.dtype, generator=torch.Generator().manual_seed(1))


def place(schedule):
    return Place(DIM, len(schedule), scores, 2, schedule)


SCHEDULES = schedules()


@st.composite
def specs(draw):
    kind = draw(st.sampled_from(("encoder", "decoder", "foreign")))
    schedule = draw(st.sampled_from(SCHEDULES))

    def policy(choices):
        name = draw(st.sampled_from(sorted(choices)))
        return name, {option: draw(st.sampled_from(values)) for option, values in choices[name].items()}

    routers = {
        name: args
        for name, args in ROUTERS.items()
        if (name == "none" or _try(build_policy, "router", name, place(schedule)))
        and (name != "token_merging" or kind == "encoder")
    }
    router, router_args = policy(routers)
    if router == "mixture_of_depths":
        router_args["every"] = min(router_args["every"], len(schedule))
    rule, rule_args = policy(RULES)
    where = place(schedule)
    pair = build_policy("router", router, where), build_policy("halting", rule, where)
    answers = [
        each
        for each in itertools.product((None, *ANSWERS), (None, *ANSWERS))
        if _try(check_pairing, *pair, *each, schedule) and (kind != "foreign" or not {"keep", "first"} & set(each))
    ]
    if not answers:  # saturation under a router that weighs
        rule, rule_args, answers = "none", {}, [(None, None)]
    router_kv, halting_kv = draw(st.sampled_from(answers))
    reader, reader_args = policy(READERS) if kind != "decoder" else ("none", {})
    if reader != "none":
        reader_args["bank_size"], kept = 20, {"keep", "first"} & {router_kv, halting_kv}
        reader_args["depth"] = 0 if kept else draw(st.integers(0, len(schedule) - 1))
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    flags = [draw(st.booleans()) for _ in range(4)]
    return Spec(
        kind,
        schedule,
        flags[0],
        router,
        router_args,
        rule,
        rule_args,
        router_kv,
        halting_kv,
        reader,
        reader_args,
        tuple(lengths),
        flags[1] and kind == "encoder",
        flags[2] and kind != "decoder",
        flags[3] and kind == "decoder",
        draw(st.sampled_from(("alone", "training", *(("steps",) if kind == "decoder" else ())))),
        draw(st.integers(0, 10**6)),
    )


def layers(spec):
    count = len(set(spec.schedule))
    if spec.kind == "foreign":
        return [
            nn.TransformerEncoderLayer(DIM, 2, 12, 0.0, norm_first=spec.pre_norm, dtype=torch.float64)
            for _ in range(count)
        ]
    sizes = {"embed_dim": DIM, "ffn_embed_dim": 12, "attention_heads": 2, "normalize_before": spec.pre_norm}
    both = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in sizes.items()}
    cfg = TransformerConfig.from_namespace(
        Namespace(**both, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0)
    )
    return [
        EncoderLayer(cfg) if spec.kind == "encoder" else DecoderLayer(cfg, no_encoder_attn=not spec.source)
        for _ in range(count)
    ]


class Net(nn.Module):
    """A stack with its policies, and one way to call it: [B, T, C] and [B, T], true at tokens, to [B, T, C]."""

    def __init__(self, spec):
        super().__init__()
        where = place(spec.schedule)
        self.spec, self.reader = spec, build_policy("reader", spec.reader, where, **spec.reader_args)
        policies = {
            "halting": build_policy("halting", spec.rule, where, **spec.rule_args),
            "router": build_policy("router", spec.router, where, **spec.router_args),
            "router_kv": spec.router_kv,
            "halting_kv": spec.halting_kv,
        }
        if spec.kind == "foreign":
            self.stack = ForeignStack(layers(spec), DIM, spec.schedule, reader=self.reader, heads=2, **policies)
        else:
            kind = DecoderStack if spec.kind == "decoder" else LayerStack
            self.stack = kind(layers(spec), spec.schedule, pass_depth=True, **policies)
            self.stack.check_reader(self.reader)
            for layer in self.stack:
                layer.need_attn = False  # with weights fairseq takes its softmax in float32

    def forward(self, x, tokens, protected=None, source=None, state=None):
        padding = None if tokens.all() else ~tokens
        if self.spec.kind == "foreign":
            out = self.stack(x, padding, protected=protected)
            return out if self.reader is None else out[0][:, : x.size(1)]
        if self.spec.kind == "encoder":
            out = self.stack(x.transpose(0, 1), padding, protected, reader=self.reader)
            return (out if self.reader is None else out[0][: x.size(1)]).transpose(0, 1)
        future = torch.full((x.size(1),) * 2, float("-inf"), dtype=x.dtype).triu(1) if state is None else None
        source = None if source is None else source.transpose(0, 1)
        x = x.transpose(0, 1)
        return self.stack(x, source, None, state, future, padding)[0].transpose(0, 1)


def unsettle(net):
    """Weights under which tokens stop everywhere."""
    for name, each in net.named_parameters():
        if name.endswith("halting.unit.bias"):
            each.data.fill_(-1.0)
        elif "router" in name and name.endswith(".4.bias") and each.numel() == 2:
            each.data.mul_(0.5)
        elif "halting.unit" in name or "router" in name:
            each.data.normal_(0.0, 0.7)
        else:
            each.data += 0.2 * torch.randn_like(each)


def same(one, other):
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def run(net, packed, *args):
    net.stack.packed = packed
    with torch.no_grad(), recording(net) as traces:
        out = net(*args)
    return out, traces["stack"][0] if traces["stack"] else None


@settings(max_examples=500, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(spec=specs())
def test_a_random_stack(spec):
    torch.manual_seed(spec.seed)
    net = Net(spec)
    unsettle(net)
    net = net.double().eval()
    batch, longest = len(spec.lengths), max(spec.lengths)
    place, lengths = torch.arange(longest), torch.tensor(spec.lengths)[:, None]
    tokens = place >= longest - lengths if spec.left else place < lengths
    x = torch.randn(batch, longest, DIM, dtype=torch.float64)  # junk at padding, too
    protected = torch.rand(batch, longest) < 0.3 if spec.protected else None
    source = torch.randn(batch, 3, DIM, dtype=torch.float64) if spec.source else None
    dense, trace = run(net, False, x, tokens, protected, source)
    packed, other = run(net, True, x, tokens, protected, source)
    same(packed[tokens], dense[tokens])
    assert dense[tokens].isfinite().all() and torch.equal(trace.updates[trace.tokens], other.updates[other.tokens])
    if trace.remainders is not None:
        same(trace.remainders[trace.tokens], other.remainders[other.tokens])
    if spec.then == "alone":
        row = spec.seed % batch
        some = tokens[row]
        single = [None if each is None else each[row : row + 1] for each in (protected, source)]
        single[0] = None if protected is None else single[0][:, some]
        for kind in (False, True):
            alone = run(net, kind, x[row : row + 1, some], some[some][None], *single)[0]
            same(alone[0], dense[row, some])
    elif spec.then == "steps":
        check_steps(net, x, tokens, source, dense)
    else:
        check_training(net, x, tokens, protected, source)


def check_steps(net, x, tokens, source, whole):
    """With padding at the end of some sentences, as in a batch of prefixes, and with sentences reordered."""
    state, order = {}, torch.arange(len(x)).flip(0) if source is None else torch.arange(len(x))
    net.stack.packed = None
    with torch.no_grad():
        for step in range(x.size(1)):
            if step == x.size(1) // 2:
                for layer in {id(each): each for each in net.stack}.values():
                    layer.reorder_incremental_state(state, order)
                x, tokens, whole = x[order], tokens[order], whole[order]
            every = torch.ones_like(tokens[:, :1])
            out = net(x[:, step : step + 1], every, None, source, state)[:, 0]
            # without policies fairseq's own attention looks at the source, whose softmax is in float32
            size = 1e-10 if net.stack.adaptive or source is None else 1e-5
            torch.testing.assert_close(out[tokens[:, step]], whole[tokens[:, step], step], rtol=10 * size, atol=size)


def check_training(net, x, tokens, protected, source):
    net.stack.packed = None
    with recording(net.train()) as traces:
        loss = net(x, tokens, protected, source)[tokens].sin().sum()
    policies = [each for each in (net.stack.router, net.stack.halting, net.reader) if each is not None]
    loss = loss + sum(each.price(trace) for each in policies for trace in traces["stack"])
    loss.backward()
    missing = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not missing, missing

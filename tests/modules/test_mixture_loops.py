"""Mixture-of-Depths and Mixture-of-Recursions against loops over the tokens of one sentence, in float64, written from the
equations: outputs, prices and all gradients. Sentences are of several lengths: padding competes for nothing."""

import math
from argparse import Namespace

import pytest
import torch
from fairseq.models.transformer import TransformerConfig
from torch import nn

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules import DecoderLayer, DecoderStack, EncoderLayer, LayerStack, layer_schedule, recording
from fairseq_adaptive.modules.policies import Choice, Counts, Place, Router, build_policy
from fairseq_adaptive.modules.policies.mixture_of_depths import share_of

DIM, HEADS, LENGTHS = 8, 2, (11, 1, 7, 4)


def make(name, depths=8, unique=4, causal=True, kv=None, sharing="middle_cycle", **options):
    torch.manual_seed(3)
    schedule = layer_schedule(sharing, unique, depths)
    args = {
        f"{side}_{key}": value
        for side in ("encoder", "decoder")
        for key, value in {
            "embed_dim": DIM,
            "ffn_embed_dim": 12,
            "attention_heads": HEADS,
            "normalize_before": True,
        }.items()
    }
    args = Namespace(**args, dropout=0.0, attention_dropout=0.0, activation_fn="relu")
    cfg = TransformerConfig.from_namespace(args)
    layers = [DecoderLayer(cfg, no_encoder_attn=True) if causal else EncoderLayer(cfg) for _ in range(unique)]
    router = build_policy("router", name, Place(DIM, depths, schedule=schedule), **options)
    kind = DecoderStack if causal else LayerStack
    stack = kind(layers, schedule, pass_depth=True, router=router, router_kv=kv).double().train()
    for name, parameter in stack.named_parameters():
        size = 0.2 if not name.startswith("router") else 0.05 if name.endswith("bias") else 0.7
        parameter.data += size * torch.randn_like(parameter)
    for each in layers:
        each.need_attn = False  # with weights fairseq takes its softmax in float32, in a float64 model, too
    stack.traces = []
    return stack


def batch():
    torch.manual_seed(5)
    x = torch.randn(max(LENGTHS) + 2, len(LENGTHS), DIM, dtype=torch.float64)
    return x, torch.arange(len(x))[None] >= torch.tensor(LENGTHS)[:, None]


def run(stack, x, mask):
    """The states; the trace is added to ``stack.traces``."""
    with recording(stack) as traces:
        if not isinstance(stack, DecoderStack):
            out = stack(x, mask)
        else:
            future = torch.full((len(x), len(x)), -torch.inf, dtype=x.dtype).triu(1)
            out = stack(x, self_attn_mask=future, self_attn_padding_mask=mask)[0]
    stack.traces += traces[""]
    return out


def layer_of(layer, x, causal, made=None):
    """P x C of one sentence; ``made``: keys and values to read, of all tokens, and which of them these are."""

    def split(y):
        return y.unflatten(-1, (HEADS, -1)).transpose(0, 1)

    y, attention = layer.self_attn_layer_norm(x), layer.self_attn
    keys, values = split(attention.k_proj(y)), split(attention.v_proj(y))
    where = torch.arange(len(x))
    if made is not None:
        where, store = made
        keys, values = store.setdefault(layer, (keys, values))
    scores = split(attention.q_proj(y)) @ keys.transpose(-1, -2) / math.sqrt(DIM // HEADS)
    if causal:
        scores = scores.masked_fill(torch.arange(keys.size(1))[None] > where[:, None], -torch.inf)
    x = x + attention.out_proj((scores.softmax(-1) @ values).transpose(0, 1).flatten(1))
    return x + layer.fc2(torch.relu(layer.fc1(layer.final_layer_norm(x))))


def block(stack, recursion, x, chosen, causal, store):
    router = stack.router
    for depth in range(router.first + recursion * router.block, router.first + (recursion + 1) * router.block):
        x = layer_of(stack[depth], x, causal, (chosen, store) if store is not None else None)
    return x


def expert_choice(stack, x, causal, update=None):
    """T x C -> T x C, and of each recursion the terms of the price."""
    router, terms, taken, store = stack.router, [], list(range(len(x))), {} if stack.router_kv == "first" else None
    x = layer_of(stack[0], x, causal)
    for recursion in range(router.count):
        share = (router.count - recursion) / router.count
        if update is not None:
            share += (1 - share) * (1 + math.cos(math.pi * min(1, update / router.warmup))) / 2
        score = router.unit[recursion](x[taken])[:, 0]
        guess = score if router.auxiliary is None else router.auxiliary[recursion](x[taken].detach())[:, 0]
        room = max(1, int(share * len(x)))
        order = sorted(range(len(taken)), key=lambda place: -score[place].item())[:room]
        target = torch.tensor([float(place in order) for place in range(len(taken))]).to(x)
        terms.append(
            -(target * guess.sigmoid().log() + (1 - target) * (-guess).sigmoid().log()) + router.z_loss * score**2
        )
        gate = {"sigmoid": score.sigmoid(), "tanh": score.tanh(), "none": score}[router.named_gate] * router.alpha
        chosen = sorted(order)
        taken, gate = [taken[place] for place in chosen], gate[chosen]
        out = block(stack, recursion, x[taken], torch.tensor(taken), causal, store)
        x = x.index_add(0, torch.tensor(taken), gate[:, None] * out)
    return layer_of(stack[len(stack) - 1], x, causal), terms


def token_choice(stack, x, causal):
    router, store = stack.router, {} if stack.router_kv == "first" else None
    x = layer_of(stack[0], x, causal)
    scores = router.unit(x)
    chances = router.alpha * (scores.softmax(-1) if router.function == "softmax" else scores.sigmoid())
    last = (chances if router.bias is None else chances + router.bias).argmax(-1)
    h = out = x
    for recursion in range(router.count):
        active = (last >= recursion).nonzero()[:, 0]
        new = block(stack, recursion, h[active], active, causal, store) if len(active) else h[active]
        h = h.index_copy(0, active, new)
        ending = (last == recursion).nonzero()[:, 0]
        out = out.index_add(0, ending, chances[ending, recursion][:, None] * h[ending])
    return layer_of(stack[len(stack) - 1], out, causal), (scores, chances / chances.sum(-1, keepdim=True), last)


def mixture_of_depths(stack, x, causal):
    router, terms = stack.router, []
    for depth in range(len(stack)):
        if (depth + 1) % router.every:
            x = layer_of(stack[depth], x, causal)
            continue
        unit = router[depth // router.every]
        predictor = None if router.predictors is None else router.predictors[depth // router.every]
        score = unit(x)[:, 0]
        guess = score if predictor is None else predictor(x.detach())[:, 0]
        room = max(1, math.ceil(router.capacity * len(x)))
        chosen = sorted(sorted(range(len(x)), key=lambda place: -score[place].item())[:room])
        target = torch.zeros(len(x)).to(x)
        target[chosen] = 1.0
        terms.append(-(target * guess.sigmoid().log() + (1 - target) * (-guess).sigmoid().log()))
        weight = (score if router.weighting == "score" else score.sigmoid())[chosen]
        added = layer_of(stack[depth], x[chosen], causal) - x[chosen]
        x = x.index_add(0, torch.tensor(chosen), weight[:, None] * added)
    return x, terms


def assert_same(stack, out, expected, price, expected_price, x, mask):
    weight = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(2))
    names, parameters = zip(("x", x), *stack.named_parameters())
    losses = [(out[:length, row] * weight[:length, row]).sum() for row, length in enumerate(LENGTHS)]
    others = [(each * weight[: len(each), row]).sum() for row, each in enumerate(expected)]
    for row, each in enumerate(expected):
        torch.testing.assert_close(out[: len(each), row], each, rtol=0, atol=1e-10)
    torch.testing.assert_close(price.to(expected_price), expected_price, rtol=0, atol=1e-10)
    one = torch.autograd.grad(sum(losses) + price, parameters)
    other = torch.autograd.grad(sum(others) + expected_price, parameters)
    for name, first, second in zip(names, one, other):
        torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-9, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("causal", (False, True), ids=("encoder", "decoder"))
@pytest.mark.parametrize("kv", ("active", "first"))
@pytest.mark.parametrize(
    "options",
    (
        {},
        {"gate": "tanh", "z_loss": 0.3},
        {"gate": "none", "mlp": True},
        {"auxiliary": True, "alpha": 0.5},
        {"warmup": 10},
    ),
    ids=str,
)
def test_expert_choice(options, kv, causal):
    stack = make("mixture_of_recursions", causal=causal, kv=kv, **options)
    stack.router.named_gate, update = options.get("gate", "sigmoid"), 3 if "warmup" in options else None
    stack.router.set_num_updates(update or 0)
    (x, mask), found = batch(), []
    x.requires_grad_()
    out = run(stack, x, mask)
    for row, length in enumerate(LENGTHS):
        found.append(expert_choice(stack, x[:length, row], causal, update))
    price = sum(torch.cat(terms).mean() for terms in zip(*(terms for _, terms in found)))
    assert_same(stack, out, [each for each, _ in found], stack.router.price(stack.traces[0]), price, x, mask)
    if update is None:
        taken = [step.alive.sum(1).tolist() for step in stack.router.begun(stack.traces[0])]
        assert taken == [[11, 1, 7, 4], [7, 1, 4, 2], [3, 1, 2, 1]]


@pytest.mark.parametrize("training", (True, False), ids=("training", "evaluation"))
@pytest.mark.parametrize("kv", ("active", "first"))
@pytest.mark.parametrize(
    "options", ({}, {"function": "sigmoid", "alpha": 0.1}, {"z_loss": 0.3}, {"mlp": True}, {"balance": "bias"}), ids=str
)
def test_token_choice(options, kv, training):
    stack = make("token_choice", kv=kv, **options).train(training)
    if "balance" in options:
        stack.router.bias.copy_(torch.tensor([0.1, -0.1, 0.05]))
    (x, mask), bias, count = (
        batch(),
        None if stack.router.bias is None else stack.router.bias.clone(),
        stack.router.count,
    )
    x.requires_grad_()
    found = [token_choice(stack, x[:length, row], True) for row, length in enumerate(LENGTHS)]
    out = run(stack, x, mask)
    scores, chances, last = (torch.cat(each) for each in zip(*(rest for _, rest in found)))
    load = torch.stack([(last == number).double() for number in range(count)])
    price = stack.router.z_loss * scores.logsumexp(-1).square().mean()
    if bias is None:
        price = price + count * (chances.mean(0) * load.mean(1)).sum()
    elif training:
        expected = bias + 0.001 * (load.sum(1).mean() - load.sum(1)).sign()
        torch.testing.assert_close(stack.router.bias, expected, rtol=0, atol=1e-12)
        assert not torch.equal(expected, bias)
    else:
        assert torch.equal(stack.router.bias, bias)
    assert load.sum(1).min() > 0 or "mlp" in options
    assert_same(stack, out, [each for each, _ in found], stack.router.price(stack.traces[0]), price, x, mask)


def test_token_choice_warms_up_with_all_recursions():
    stack, (x, mask) = make("token_choice", warmup=5), batch()
    for update, expected in ((4, True), (5, False)):
        stack.router.set_num_updates(update)
        run(stack, x, mask)
        assert torch.equal(stack.traces[-1].steps[5].alive, ~mask) == expected


@pytest.mark.parametrize("causal", (False, True), ids=("encoder", "decoder"))
@pytest.mark.parametrize(
    "options",
    ({}, {"capacity": "12.5%", "every": 2, "weighting": "score"}, {"every": 3}, {"predictor": True, "capacity": 0.3}),
    ids=str,
)
def test_mixture_of_depths(options, causal):
    stack, (x, mask) = make("mixture_of_depths", 5, 5, causal, **options), batch()
    x.requires_grad_()
    out = run(stack, x, mask)
    found = [mixture_of_depths(stack, x[:length, row], causal) for row, length in enumerate(LENGTHS)]
    price = torch.cat([term for _, terms in found for term in terms]).mean()
    assert_same(stack, out, [each for each, _ in found], stack.router.price(stack.traces[0]), price, x, mask)
    every = options.get("every", 1)
    full = [torch.equal(step.alive, ~mask) for step in stack.traces[0].steps]
    assert full == [bool((depth + 1) % every) for depth in range(5)]


@pytest.mark.parametrize(
    "name, options", (("mixture_of_depths", {"predictor": True}), ("mixture_of_recursions", {"auxiliary": True}))
)
def test_the_price_of_a_predictor_does_not_move_the_rest(name, options):
    """Its states have no gradient."""
    stack, (x, mask) = make(name, **options), batch()
    run(stack, x, mask)
    stack.router.price(stack.traces[0]).backward()
    moved = {
        name for name, parameter in stack.named_parameters() if parameter.grad is not None and parameter.grad.any()
    }
    assert moved == {name for name, _ in stack.named_parameters() if "predictor" in name or "auxiliary" in name}


@torch.no_grad()
@pytest.mark.parametrize(
    "name, options, bound",
    (
        ("mixture_of_recursions", {"threshold": 0.7}, math.log(7 / 3)),
        ("mixture_of_recursions", {"auxiliary": True}, 0.0),
        ("mixture_of_depths", {"predictor": True}, 0.0),
        ("mixture_of_depths", {"every": 2}, 0.0),
    ),
)
def test_evaluation_of_a_decoder_takes_those_above_the_threshold(name, options, bound):
    stack, (x, mask) = make(name, **options).eval(), batch()
    run(stack, x, mask)
    steps = [step for step in stack.traces[0].steps if step.score is not None]
    open_to = ~mask
    for number, step in enumerate(steps):
        everyone = name == "mixture_of_recursions" and number == 0  # there is room for all
        expected = (step.score >= bound) & open_to | (open_to if everyone else torch.zeros_like(open_to))
        assert torch.equal(step.alive, expected)
        open_to = expected if name == "mixture_of_recursions" else open_to


def test_protected_tokens_are_always_taken():
    for name in ("mixture_of_depths", "mixture_of_recursions", "token_choice"):
        stack, (x, mask) = make(name, causal=False), batch()
        protected = torch.zeros_like(mask)
        protected[:, 2] = True
        with recording(stack) as traces:
            stack(x, mask, protected)
        assert all(torch.equal(step.alive[:, 2], ~mask[:, 2]) for step in traces[""][0].steps), name


def test_a_price_of_nothing_is_zero():
    """Also of a packed run, whose trace it is made of in evaluation."""
    for name in ("mixture_of_depths", "mixture_of_recursions", "token_choice"):
        stack, (x, mask) = make(name).eval(), batch()
        for packed in (False, True):
            stack.packed = packed
            with torch.no_grad():
                run(stack, x, mask)
        dense, packed = map(stack.router.price, stack.traces)
        torch.testing.assert_close(dense, packed, rtol=0, atol=1e-10)
        stack.traces[0].steps = []
        assert stack.router.price(stack.traces[0]) == 0


def test_cost_of_deciding():
    place = Place(DIM, 8, schedule=layer_schedule("middle_cycle", 4, 8))

    def macs(name, **options):
        router = build_policy("router", name, place, **options)
        return sum(router.macs(Counts(100.0, 1, DIM, depth)) for depth in range(8))

    assert macs("mixture_of_depths") == 800 * DIM
    assert macs("mixture_of_depths", every=2) == 400 * DIM
    assert macs("mixture_of_depths", predictor=True) == 800 * (DIM + 2 * DIM * DIM + 2 * DIM)
    assert macs("mixture_of_recursions") == 100 * 3 * DIM
    assert macs("token_choice") == 100 * 3 * DIM


@pytest.mark.parametrize(
    "schedule, options, expected",
    (
        ((0, 1, 2, 1, 2, 1, 2, 3), {}, (1, 2, 3, True)),
        ((0, 1, 1, 1, 2, 2, 2, 3), {}, (1, 2, 3, False)),
        ((0, 1, 0, 1), {}, (0, 2, 2, True)),
        ((0,) * 6, {}, (0, 1, 6, True)),
        ((), {"recursions": 3}, (0, 2, 3, False)),
    ),
)
def test_recursions_follow_the_schedule(schedule, options, expected):
    router = build_policy(
        "router", "mixture_of_recursions", Place(DIM, len(schedule) or 6, schedule=schedule), **options
    )
    assert (router.first, router.block, router.count, router.computes_all_first) == expected


@pytest.mark.parametrize(
    "name, options, message",
    (
        ("mixture_of_recursions", {"recursions": 4}, "6 depths that share layers cannot be 4 recursions"),
        ("mixture_of_recursions", {"gate": "relu"}, "must be one of sigmoid, tanh, none"),
        ("mixture_of_recursions", {"threshold": 1}, "a threshold of 1 is impossible"),
        ("mixture_of_recursions", {"auxiliary": True, "z_loss": 1.0}, "leave out auxiliary"),
        ("mixture_of_recursions", {"sharing": "middle_sequence", "kv": "first"}, "a router that computes all tokens"),
        ("mixture_of_recursions", {"kv": "keep"}, "no keys to keep"),
        ("mixture_of_recursions", {"sharing": "cycle", "unique": 8}, "share layers with --layer-sharing middle_cycle"),
        ("token_choice", {"function": "relu"}, "must be softmax or sigmoid"),
        ("token_choice", {"balance": "no"}, "loss or bias"),
        ("token_choice", {"recursions": 1}, "cannot be 1 recursions"),
        ("mixture_of_depths", {"every": 9}, "every other \\(2\\)"),
        ("mixture_of_depths", {"weighting": "no"}, "choose score or sigmoid"),
        ("mixture_of_depths", {"capacity": "0%"}, "0% is impossible"),
        ("mixture_of_depths", {"capacity": "much"}, "much is impossible"),
    ),
)
def test_refused(name, options, message):
    with pytest.raises(UsageError, match=message):
        make(name, **options)


def test_capacities():
    assert [share_of(each) for each in (1, 0.125, "0.125", "12.5%", "100%")] == [1, 0.125, 0.125, 0.125, 1]


@pytest.mark.parametrize("name", ("mixture_of_recursions", "token_choice"))
def test_routers_begin_small(name):
    router = build_policy("router", name, Place(64, 8, schedule=layer_schedule("middle_cycle", 4, 8)), mlp=True)
    for key, parameter in router.named_parameters():
        assert not parameter.any() if key.endswith("bias") else parameter.std().item() == pytest.approx(0.02, rel=0.2)
        nn.init.ones_(parameter)
    router.reset_parameters()
    assert all(parameter.abs().max() < 0.2 for parameter in router.parameters())


def test_what_is_carried_reaches_combine():
    """Also where a choice does not change it, in dense and packed runs alike."""

    class Doubles(Router, nn.Module):
        monotone, weighs = False, True

        def start(self, x):
            return {"factor": 1 + x[..., 0].sigmoid()}

        def choose(self, depth, x, carry, asked, sentence, protected, causal):
            run = (x[..., 1] > 0).to(x)
            return Choice(run, run)

        def combine(self, before, after, choice):
            return before + (choice.run * choice.carry["factor"]).unsqueeze(-1) * (after - before)

    stack, (x, mask) = make("mixture_of_depths").eval(), batch()
    stack.router, outs = Doubles(), []
    for packed in (False, True):
        stack.packed = packed
        with torch.no_grad():
            outs.append(run(stack, x, mask)[~mask.t()])
    torch.testing.assert_close(*outs, rtol=0, atol=1e-10)

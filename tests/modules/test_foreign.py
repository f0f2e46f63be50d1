"""Layers of other libraries under policies: dense equals packed, alone and in any batch; compute is saved; what breaks
the contract is refused with the name of its class."""

import itertools

import pytest
import torch
from torch import nn

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules import ForeignStack, LayerStack, recording
from fairseq_adaptive.modules.policies import MixtureOfDepths, Place, Skimming, build_policy
from fairseq_adaptive.modules.policies.tape import LearnedTape

DIM, DEPTHS, LENGTHS = 16, 4, (9, 1, 6, 4)
ROUTERS, RULES = ("none", "skimming", "depths", "monotone"), ("none", "act", "ut_act", "pondernet")
CASES = [
    (router, rule, router_kv, halting_kv)
    for router, rule in itertools.product(ROUTERS, RULES)
    for router_kv in (("active", "recompute") if router != "none" else (None,))
    for halting_kv in (("active", "recompute") if rule != "none" else (None,))
    if (router, rule) != ("none", "none")
]


def torch_layers(count=2, **options):
    return [nn.TransformerEncoderLayer(DIM, 2, 24, 0.0, **options) for _ in range(count)]


def bert_layers(count=2, attention="eager"):
    pytest.importorskip("transformers")
    bert = pytest.importorskip("transformers.models.bert.modeling_bert")
    from transformers import BertConfig

    config = BertConfig(
        hidden_size=DIM,
        num_attention_heads=2,
        intermediate_size=24,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation=attention,
    )
    return [bert.BertLayer(config) for _ in range(count)]


def own_layers(count=2):
    """Called as the third argument of a stack says."""

    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2 * DIM, DIM)

        def forward(self, states, lengths, there):
            mean = (states * there).sum(1, keepdim=True) / lengths
            return states + self.linear(torch.cat((states, mean.expand_as(states)), -1)).tanh()

    return [Mean() for _ in range(count)]


def call_own(layer, x, padding_mask):
    there = torch.ones_like(x[..., :1]) if padding_mask is None else (~padding_mask)[..., None].to(x)
    return layer(x, there.sum(1, keepdim=True), there)


KINDS = {
    "torch": (torch_layers, {}),
    "torch-batch-first": (lambda: torch_layers(batch_first=True, norm_first=True), {}),
    "bert": (bert_layers, {}),
    "bert-fused": (lambda: bert_layers(attention="sdpa"), {}),
    "own": (own_layers, {"call": call_own}),
}

GRID = [(kind, case) for kind in KINDS for case in CASES[:: 1 if kind in ("torch", "bert") else 5]]
grid = pytest.mark.parametrize(
    "kind, case", GRID, ids=lambda each: each if isinstance(each, str) else "-".join(map(str, each))
)


def make(kind, router="none", rule="none", router_kv=None, halting_kv=None, reader=None):
    torch.manual_seed(3)
    build, options = KINDS[kind]
    routers = {
        "none": lambda: None,
        "skimming": lambda: Skimming(DIM, DEPTHS),
        "depths": lambda: MixtureOfDepths(DIM, DEPTHS, 0.6),
        "monotone": lambda: MixtureOfDepths(DIM, DEPTHS, 0.6),
    }
    threshold = {"threshold": 0.9} if rule in ("act", "ut_act") else {}
    stack = ForeignStack(
        build(),
        DIM,
        (0, 1, 1, 0),
        router=routers[router](),
        router_kv=router_kv,
        halting_kv=halting_kv,
        reader=reader,
        halting=build_policy("halting", rule, Place(DIM, DEPTHS), **threshold),
        **options,
    )
    if stack.halting is not None:
        nn.init.normal_(stack.halting.unit.weight, std=0.4), nn.init.constant_(stack.halting.unit.bias, -1.0)
    for each in stack.router or ():
        if router == "skimming":
            nn.init.normal_(each[1].weight), nn.init.normal_(each[4].weight)
            each[4].bias.data.copy_(torch.tensor([-0.7, 0.7]))
        else:
            nn.init.normal_(each.weight)
    if router == "monotone":
        stack.router.monotone = True
    return stack.double().eval()


def batch():
    torch.manual_seed(5)
    x = torch.randn(len(LENGTHS), max(LENGTHS) + 2, DIM, dtype=torch.float64)
    return x, torch.arange(x.size(1))[None] >= torch.tensor(LENGTHS)[:, None]


def both(stack, *args, **kwargs):
    with recording(stack) as traces:
        outs = []
        for packed in (False, True):
            stack.packed = packed
            outs.append(stack(*args, **kwargs))
    return outs, traces[""]


@torch.no_grad()
@grid
def test_dense_equals_packed_alone_and_in_a_batch(kind, case):
    stack = make(kind, *case)
    x, padding = batch()
    (dense, packed), (one, other) = both(stack, x, padding)
    torch.testing.assert_close(dense[~padding], packed[~padding], rtol=0, atol=1e-10)
    assert torch.equal(one.updates, other.updates) and one.updates[~padding].unique().numel() > 1
    for stack.packed in (False, True):
        for row, length in enumerate(LENGTHS):
            torch.testing.assert_close(stack(x[row : row + 1, :length])[0], dense[row, :length], rtol=0, atol=1e-10)


@torch.no_grad()
def test_a_token_that_is_left_out_is_as_if_it_were_not_there():
    """Against a loop over the depths in which left-out tokens are deleted."""
    stack = make("torch", "skimming")
    for each in stack.router:
        each[4].bias.data.copy_(torch.tensor([-2.0, 2.0]))
    x, _ = batch()
    x = state = x[:1]
    there = torch.arange(x.size(1))
    for depth, number in enumerate(stack.schedule):
        kept = stack.router.choose(depth, state[0, there], {}, None, None, None, False).run > 0
        there = there[kept]
        state = state.clone()
        state[:, there] = stack.layer(number)(state[:, there].transpose(0, 1)).transpose(0, 1)
    assert 0 < len(there) < x.size(1)
    torch.testing.assert_close(stack(x), state, rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("kv, whole", [("active", False), ("recompute", True)])
def test_compute_is_saved(kv, whole):
    """How many tokens each layer is called with: those that run, or all of sentences of which one runs."""
    stack = make("torch", rule="act", halting_kv=kv)
    x, padding = batch()
    ran = []
    for layer in (stack.layer(0), stack.layer(1)):
        layer.register_forward_hook(
            lambda layer, args, out: ran.append(
                int((~args[2]).sum()) if args[2] is not None else args[0][..., 0].numel()
            )
        )
    with recording(stack) as traces:
        stack(x, padding)
    alive = [step.alive for step in traces[""][0].steps]
    some = [(each.any(1) * torch.tensor(LENGTHS)).sum() for each in alive]
    assert ran == [int(each) for each in (some if whole else (each.sum() for each in alive))]
    assert ran[-1] < sum(LENGTHS)


@torch.no_grad()
@pytest.mark.parametrize("kind", ("torch", "torch-batch-first", "bert"))
@pytest.mark.parametrize("router, rule", [("none", "none"), ("skimming", "none"), ("skimming", "act"), ("none", "act")])
def test_a_mask_goes_with_the_tokens(kind, router, rule):
    stack = make(kind, router, rule, halting_kv="active" if rule != "none" else None)
    x, padding = batch()
    mask = torch.ones(x.size(1), x.size(1), dtype=torch.bool).triu(1)
    (dense, packed), _ = both(stack, x, padding, mask)
    torch.testing.assert_close(dense[~padding], packed[~padding], rtol=0, atol=1e-10)
    later = x.clone()
    later[0, 5:] += 1.0
    for stack.packed in (False, True):
        torch.testing.assert_close(stack(later, padding, mask)[0, :5], dense[0, :5], rtol=0, atol=1e-10)
        floating = torch.zeros(mask.shape, dtype=x.dtype).masked_fill(mask, float("-inf"))
        torch.testing.assert_close(stack(x, padding, floating)[~padding], dense[~padding], rtol=0, atol=1e-10)
    assert (stack(x, padding) - dense)[~padding].abs().max() > 1e-3


@pytest.mark.parametrize(
    "kind, case, masked",
    [
        (*each, masked) for each in GRID for masked in (False, True) if each[0] != "own" or not masked
    ],  # which takes no mask
    ids=str,
)
def test_gradients_are_finite_and_reach_everything(kind, case, masked):
    stack = make(kind, *case).train()
    x, padding = batch()
    mask = torch.ones(x.size(1), x.size(1), dtype=torch.bool).triu(1) if masked else None
    with recording(stack) as traces:
        loss = stack(x, padding, mask)[~padding].sin().sum()
    if stack.router is not None:
        loss = loss + stack.router.price(traces[""][0])
    loss.backward()
    for name, parameter in stack.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_a_step_in_which_nothing_is_kept_has_gradients_of_zero():
    stack = make("torch", "skimming").train()
    for each in stack.router:
        each[4].bias.data.copy_(torch.tensor([1e3, -1e3]))
    x, padding = batch()
    stack(x.requires_grad_(), padding).sum().backward()
    assert all(each.grad.eq(0).all() for layer in (stack.layer(0), stack.layer(1)) for each in layer.parameters())


@torch.no_grad()
@pytest.mark.parametrize("depth", (0, 2))
@pytest.mark.parametrize("case", [("none",) * 2, ("skimming", "none"), ("depths", "act"), ("none", "act")], ids=str)
def test_a_reader(case, depth):
    torch.manual_seed(6)
    tape = LearnedTape(DIM, heads=2, tokens=5, threshold=2.5, bank_size=40, mlp_dim=6, depth=depth)
    nn.init.normal_(tape.reader.norm.weight, 3.0, 0.5), nn.init.normal_(tape.bank.weight)
    stack = make("torch", *case, reader=tape)
    x, padding = batch()
    (dense, packed), (one, other) = both(stack, x, padding)
    (state, wide, _), lengths = dense, dense[2].live.sum(1)
    assert lengths.unique().numel() > 1 and torch.equal(one.tokens, ~wide) and torch.equal(one.updates, other.updates)
    torch.testing.assert_close(state[~wide], packed[0][~wide], rtol=0, atol=1e-10)
    for row, length in enumerate(LENGTHS):
        alone, *_ = stack(x[row : row + 1, :length])
        torch.testing.assert_close(alone[0, :length], state[row, :length], rtol=0, atol=1e-10)
    with pytest.raises(UsageError, match="reads all tokens"):
        stack(x, padding, torch.zeros(x.size(1), x.size(1), dtype=torch.bool))


class Mixes(nn.Module):
    """A layer that sees all of the batch."""

    def forward(self, x, src_key_padding_mask=None, **anything):
        return x + x.mean(0, keepdim=True)


class ReadsPadding(nn.Module):
    def forward(self, x, **anything):
        return x + x.mean(1, keepdim=True)


class Wider(nn.Linear):
    def __init__(self):
        super().__init__(DIM, DIM + 1)


class Counts(nn.Module):
    """A layer that says who it is, and takes what a stack says, and does not heed it."""

    attends = None

    def forward(self, x, depth=0):
        return x


BROKEN = [
    (Mixes, lambda layer, x, padding_mask: layer(x), "Mixes mixes the sentences"),
    (ReadsPadding, lambda layer, x, padding_mask: layer(x), "ReadsPadding reads padding"),
    (Wider, lambda layer, x, padding_mask: layer(x), r"Wider makes \(2, 5, 17\)"),
    (Wider, None, "Wider takes neither src_key_padding_mask nor attention_mask"),
    (Mixes, None, "Mixes does not run on states"),
]


@pytest.mark.parametrize("layer, call, message", BROKEN, ids=lambda each: getattr(each, "__name__", None))
def test_layers_that_break_the_contract_are_refused(layer, call, message):
    with pytest.raises(UsageError, match=message):
        ForeignStack([layer()], DIM, call=call)


@pytest.mark.parametrize(
    "make_layer, message",
    [
        (
            lambda: torch_layers(1)[0],
            "TransformerEncoderLayer cannot run under a router or a halting rule: it does not say",
        ),
        (Mixes, "Mixes .* put it into a ForeignStack"),
        (Counts, "it lacks the argument self_attention of forward, the argument residual of forward"),
    ],
)
def test_a_stack_of_fairseqs_layers_refuses_others(make_layer, message):
    """A layer that takes any argument would run on packed tokens as if they were one sentence."""
    with pytest.raises(UsageError, match=message):
        LayerStack([make_layer()], (0,), pass_depth=True, halting=build_policy("halting", "act", Place(DIM, 1)))
    LayerStack([make_layer()], (0,))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"halting": "act", "halting_kv": "keep"}, "layers of other libraries do not show"),
        ({"halting": "margin"}, "word scores"),
        ({"router": "nonsense"}, "unknown router"),
        ({"reader": LearnedTape(DIM, heads=2, depth=2)}, "never reads"),
    ],
)
def test_policies_that_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        ForeignStack(torch_layers(1), DIM, (0, 0), **options)


def test_making_a_stack_draws_no_random_numbers_and_keeps_the_mode():
    layers = torch_layers(2, batch_first=True)
    layers[1].dropout.eval()
    before = torch.get_rng_state()
    ForeignStack(layers, DIM)
    assert torch.equal(before, torch.get_rng_state())
    assert layers[0].training and layers[1].training and not layers[1].dropout.training

"""Token merging against a loop over the tokens of one sentence, in float64, written from the paper's description: outputs and
all gradients. Then what is ours: any batch, what stands for what, halting rules and readers beside it, what is refused."""

import math
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F
from fairseq.models.transformer import TransformerConfig
from torch import nn

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules import DecoderLayer, DecoderStack, EncoderLayer, ForeignStack, LayerStack, recording
from fairseq_adaptive.modules.policies import Place, build_policy
from fairseq_adaptive.modules.policies.tape import LearnedTape

DIM, HEADS, DEPTHS, LENGTHS = 8, 2, 5, (11, 1, 7, 4)
OPTIONS = {"r": {"r": 2}, "share": {"share": 0.3}, "half": {"share": 0.5}, "many": {"r": 50}}


def config(pre=True):
    sizes = {"embed_dim": DIM, "ffn_embed_dim": 12, "attention_heads": HEADS, "normalize_before": pre}
    both = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in sizes.items()}
    return TransformerConfig.from_namespace(Namespace(**both, dropout=0.0, attention_dropout=0.0, activation_fn="relu"))


def make(unique=3, halting=None, pre=True, halting_kv=None, **options):
    torch.manual_seed(3)
    schedule = tuple(depth % unique for depth in range(DEPTHS))
    place = Place(DIM, DEPTHS, schedule=schedule)
    given = {"threshold": 0.9} if halting in ("act", "ut_act", "saturation") else {}
    stack = LayerStack(
        [EncoderLayer(config(pre)) for _ in range(unique)],
        schedule,
        pass_depth=True,
        router=build_policy("router", "token_merging", place, **options),
        halting=build_policy("halting", halting, place, **given),
        halting_kv=halting_kv,
    )
    for name, parameter in stack.named_parameters():
        parameter.data += (0.5 if "halting" in name else 0.2) * torch.randn_like(parameter)
    return stack.double().eval()


def batch(lengths=LENGTHS, extra=2):
    torch.manual_seed(5)
    x = torch.randn(max(lengths) + extra, len(lengths), DIM, dtype=torch.float64)
    mask = torch.arange(len(x))[None] >= torch.tensor(lengths)[:, None]
    protected = torch.zeros_like(mask)
    protected[:, 0], protected[0, 5] = True, True
    return x, mask, protected


def layer_of(layer, x, size):
    """P x C of one sentence, with log(size) added to the scores."""

    def split(y):
        return y.unflatten(-1, (HEADS, -1)).transpose(0, 1)

    y, attention = layer.self_attn_layer_norm(x), layer.self_attn
    queries, keys, values = (split(part(y)) for part in (attention.q_proj, attention.k_proj, attention.v_proj))
    scores = queries @ keys.transpose(-1, -2) / math.sqrt(DIM // HEADS) + torch.tensor(size).to(x).log()
    x = x + attention.out_proj((scores.softmax(-1) @ values).transpose(0, 1).flatten(1))
    return x + layer.fc2(torch.relu(layer.fc1(layer.final_layer_norm(x))))


def naive(stack, x, protected):
    """T x C of one sentence -> T x C, for how many each of those left stands, and how many were computed at each depth."""
    router, states, left = stack.router, dict(enumerate(x)), list(range(len(x)))
    members, counts = {token: [token] for token in left}, []
    for depth in range(len(stack)):
        if depth:
            room = int(router.share * len(left)) if router.r is None else router.r
            edges = []
            for a in left[::2]:
                likes = [
                    (F.cosine_similarity(states[a], states[b], dim=0).item(), a, b)
                    for b in left[1::2]
                    if not (protected[a] or protected[b])
                ]
                edges += [max(likes)] if likes else []
            chosen = sorted(edges, reverse=True)[:room]
            for b in {b for *_, b in chosen}:
                group = [b, *(a for _, a, other in chosen if other == b)]
                weights = torch.tensor([len(members[each]) for each in group]).to(x)
                states[b] = (torch.stack([states[each] for each in group]) * weights[:, None]).sum(0) / weights.sum()
                members[b] = [token for each in group for token in members[each]]
            left = [token for token in left if token not in {a for _, a, _ in chosen}]
        size = [len(members[token]) for token in left]
        out = layer_of(stack[depth], torch.stack([states[token] for token in left]), size)
        states.update(zip(left, out))
        counts.append(len(left))
    owner = {token: standing for standing in left for token in members[standing]}
    return torch.stack([states[owner[token]] for token in range(len(x))]), size, counts


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_is_the_loop(options):
    """Dense and packed, with padding, protected tokens and several lengths; gradients, too."""
    stack, (x, mask, protected) = make(**options), batch()
    found = [naive(stack, x[:length, row], protected[row]) for row, length in enumerate(LENGTHS)]
    for packed in (False, True):
        stack.packed = packed
        with torch.no_grad(), recording(stack) as traces:
            out = stack(x, mask, protected)
        for row, (expected, size, counts) in enumerate(found):
            torch.testing.assert_close(out[: LENGTHS[row], row], expected, rtol=1e-10, atol=1e-10)
            assert sum(size) == LENGTHS[row]
            assert [int(step.alive[row].sum()) for step in traces[""][0].steps] == counts
    assert found[0][2][-1] < LENGTHS[0] and found[1][2] == [1] * DEPTHS
    grads = []
    for loss in (stack.train()(x, mask, protected)[~mask.t()].sin().sum(), sum(out.sin().sum() for out, *_ in found)):
        grads.append(torch.autograd.grad(loss, list(stack.parameters())))
    for one, other in zip(*grads):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_a_key_counts_for_each_of_its_tokens():
    """Attention to one key of size 3 is attention to three such keys."""
    stack, x = make(), torch.randn(4, DIM, dtype=torch.float64)
    thrice = torch.cat((x, x[1:2], x[1:2]))
    torch.testing.assert_close(layer_of(stack[0], x, [1, 3, 1, 1]), layer_of(stack[0], thrice, [1] * 6)[:4])


CASES = [
    (None, None),
    ("act", "recompute"),
    ("act", "active"),
    ("ut_act", "keep"),
    ("pondernet", "active"),
    ("saturation", "recompute"),
]


@torch.no_grad()
@pytest.mark.parametrize(
    "halting, kv, reads",  # keep with a reader at a later depth is refused, as with any router
    [(*case, reads) for case in CASES for reads in (None, 0, 2) if not (case[1] == "keep" and reads)],
    ids=str,
)
def test_dense_equals_packed_alone_and_in_a_batch(halting, kv, reads):
    stack, (x, mask, protected) = make(halting=halting, halting_kv=kv, pre=False, share=0.3), batch()
    reader = None
    if reads is not None:
        torch.manual_seed(6)
        reader = LearnedTape(DIM, heads=HEADS, tokens=5, threshold=2.5, bank_size=40, mlp_dim=6, depth=reads)
        nn.init.normal_(reader.reader.norm.weight, 3.0, 0.5), nn.init.normal_(reader.bank.weight)
        reader = reader.double().eval()

    def run(*given):
        out = stack(*given, reader=reader)
        return out if reader is None else out[0]

    outs = []
    with recording(stack) as traces:
        for stack.packed in (False, True):
            outs.append(run(x, mask, protected))
    dense, packed = traces[""]
    there = ~mask.t()
    torch.testing.assert_close(outs[0][: len(x)][there], outs[1][: len(x)][there], rtol=0, atol=1e-10)
    assert torch.equal(dense.updates, packed.updates) and dense.updates[dense.tokens].unique().numel() > 1
    for stack.packed in (False, True):
        for row, length in enumerate(LENGTHS):
            alone = run(x[:length, row : row + 1], None, protected[row : row + 1, :length])
            torch.testing.assert_close(alone[:length, 0], outs[0][:length, row], rtol=0, atol=1e-10)


@torch.no_grad()
def test_who_was_merged_has_the_state_of_the_other():
    """As few states are left as tokens are computed at the last depth; a protected one is nobody else's."""
    stack, (x, mask, protected) = make(share=0.5), batch()
    with recording(stack) as traces:
        out = stack(x, mask, protected)
    for row, length in enumerate(LENGTHS):
        states = out[:length, row].unique(dim=0)
        assert len(states) == int(traces[""][0].steps[-1].alive[row].sum())
        for token in protected[row, :length].nonzero():
            assert int((out[:length, row] == out[token, row]).all(-1).sum()) == 1


@torch.no_grad()
def test_nothing_merged_is_the_plain_stack():
    stack, (x, mask, protected) = make(r=0), batch()
    plain = make(r=0)
    plain.router = None
    torch.testing.assert_close(stack(x, mask, protected)[~mask.t()], plain(x, mask)[~mask.t()], rtol=0, atol=1e-10)


def test_every_state_of_pondernet_is_spread():
    """In training the states of all depths come out; each token has at each depth the state of who stands for it there."""
    stack, (x, mask, protected) = make(halting="pondernet", share=0.5), batch()
    stack.train().every_depth = True
    states = stack(x, mask, protected).chunk(DEPTHS, 1)
    left = [[len(each[:length, row].unique(dim=0)) for each in states] for row, length in enumerate(LENGTHS)]
    assert left[0] == sorted(left[0], reverse=True) and left[0][0] == LENGTHS[0] > left[0][-1]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"r": 2, "share": 0.1}, "leave one of them out"),
        ({"r": -1}, "a whole number from 0"),
        ({"r": 1.5}, "a whole number from 0"),
        ({"share": 0.6}, "from 0 to 0.5"),
        ({"share": "much"}, "from 0 to 0.5"),
        ({"rate": 3}, "has no argument 'rate'"),
    ],
    ids=str,
)
def test_impossible_numbers_are_refused(options, words):
    with pytest.raises(UsageError, match=words):
        make(**options)


def test_where_nothing_can_be_merged_is_refused():
    router = build_policy("router", "token_merging", Place(DIM, 2))
    with pytest.raises(UsageError, match="token of a causal decoder would hold later ones"):
        DecoderStack([DecoderLayer(config(), no_encoder_attn=True)], (0, 0), pass_depth=True, router=router)
    with pytest.raises(UsageError, match="cannot be told how much a key weighs"):
        ForeignStack([nn.TransformerEncoderLayer(DIM, 2, 12)], DIM, (0, 0), router=router)
    with pytest.raises(UsageError, match="would be seen twice"):
        LayerStack([EncoderLayer(config())], (0, 0), pass_depth=True, router=router, router_kv="recompute")
    stack = make()
    stack[0].self_attn.register_forward_hook(lambda *_: None)
    with pytest.raises(UsageError, match="adds the sizes of tokens to the scores of attention, but here"):
        stack(batch()[0])


@torch.no_grad()
def test_turned_after_a_training():
    """From half of the tokens at every depth to none: what is computed grows."""
    stack, (x, mask, protected) = make(r=1), batch()
    computed = []
    for position in (0.0, 0.5, 0.8, 1.0):
        flags = stack.router.turn(position)
        with recording(stack) as traces:
            stack(x, mask, protected)
        computed.append(int(traces[""][0].updates.sum()))
    assert computed == sorted(computed) and computed[-1] == DEPTHS * sum(LENGTHS) > 1.5 * computed[0]
    assert flags == {"router_args": {"r": None, "share": 0.0}}

"""Reading the tape, against a loop over rows and entries, and against numbers that the public JAX code gives."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fairseq.models.transformer import TransformerConfig
from torch import nn

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.models.adatape_stack import run_tape
from fairseq_adaptive.modules import EncoderLayer, LayerStack
from fairseq_adaptive.modules.policies.tape import GatedMLP, InputBank, LearnedBank, Tape, TapeReader, masked_mean

WIDTH, ENTRIES = 8, 24


def make(sharp=1.0, **settings):
    torch.manual_seed(2)
    reader = TapeReader(WIDTH, **{"num_tokens": 6, "threshold": 2.0, "key_dim": 4, **settings}).double().eval()
    nn.init.normal_(reader.norm.weight, sharp, 0.3)
    nn.init.normal_(reader.norm.bias, 0, 0.3)
    return reader


def make_inputs(rows=7, shared=False, entries=ENTRIES):
    torch.manual_seed(4)
    query = torch.randn(rows, WIDTH, dtype=torch.float64)
    bank = torch.randn(*(() if shared else (rows,)), entries, WIDTH, dtype=torch.float64)
    return query.requires_grad_(), bank.requires_grad_()


def normalise(norm, vector):
    spread = ((vector - vector.mean()) ** 2).mean()
    return (vector - vector.mean()) / (spread + 1e-6).sqrt() * norm.weight + norm.bias


def read_one(reader, query, bank, padding=()):
    """Algorithm 1 for one row, entry by entry: tokens (a list), cost, entries of each token."""
    each, width = int(reader.num_tokens // reader.threshold), reader.key_dim
    query, bank = normalise(reader.norm, query)[:width], [normalise(reader.norm, entry) for entry in bank]
    unread = [i for i in range(len(bank)) if i not in padding]
    certainty, cost, tokens, places = 0.0, 0.0, [], []
    while len(tokens) < reader.num_tokens and certainty < reader.threshold and unread:
        scores = {i: sum(query[d] * bank[i][d] for d in range(width)) for i in unread}
        best = sorted(unread, key=lambda i: -scores[i].item())[:each]
        powers = [torch.exp(scores[i] / math.sqrt(width)) for i in best]
        weights = [power / sum(powers) for power in powers]
        cost = cost + 1 - (sum(w * w for w in weights) if reader.cost == "entropy" else max(weights))
        token = sum(w * bank[i] for w, i in zip(weights, best))
        query = (query + token[:width]) / 2 if reader.query_update == "average" else token[:width]
        certainty += max(weights).item()
        unread = [i for i in unread if i not in best]
        tokens.append(token)
        places.append(best)
    return tokens, cost, places


@pytest.mark.parametrize("shared", (False, True), ids=("input", "learned"))
@pytest.mark.parametrize("update", ("average", "replace"))
@pytest.mark.parametrize("cost", ("entropy", "max"))
def test_reads_as_the_loop_does(shared, update, cost):
    lengths = set()
    for sharp in (0.7, 2.0):
        reader = make(sharp, cost=cost, query_update=update)
        query, bank = make_inputs(shared=shared)
        reading = reader(query, bank)
        for row in range(len(query)):
            tokens, expected_cost, places = read_one(reader, query[row], bank if shared else bank[row])
            length = int(reading.live[row].sum())
            assert length == len(tokens)
            assert torch.allclose(reading.tokens[row, :length], torch.stack(tokens), atol=1e-12)
            assert not reading.tokens[row, length:].any()
            assert torch.allclose(reading.cost[row], expected_cost, atol=1e-12)
            assert reading.entries[row, :length].tolist() == places
            assert (reading.entries[row, length:] == -1).all()
            lengths.add(length)
    assert len(lengths) > 1, "rows stop at different lengths, else nothing is adaptive here"


@pytest.mark.parametrize("shared", (False, True), ids=("input", "learned"))
def test_gradients_are_those_of_the_loop(shared):
    reader = make(1.0)
    query, bank = make_inputs(rows=3, shared=shared)
    parameters = {"query": query, "bank": bank, **dict(reader.named_parameters())}
    reading = reader(query, bank)
    weight = torch.randn_like(reading.tokens)
    ours = torch.autograd.grad((reading.tokens * weight).sum() + reading.cost.sum(), parameters.values())
    total = 0
    for row in range(3):
        tokens, cost, _ = read_one(reader, query[row], bank if shared else bank[row])
        total = total + cost + sum((token * weight[row, i]).sum() for i, token in enumerate(tokens))
    for name, got, expected in zip(parameters, ours, torch.autograd.grad(total, parameters.values())):
        assert torch.allclose(got, expected, atol=1e-10), name
        assert got.any(), name


@pytest.mark.parametrize("shared", (False, True), ids=("input", "learned"))
def test_rows_do_not_see_each_other(shared):
    """The public code lets every row take its weights from the first one."""
    reader = make(1.5)
    query, bank = make_inputs(shared=shared)
    together = reader(query, bank)
    for row in range(len(query)):
        alone = reader(query[row : row + 1], bank if shared else bank[row : row + 1])
        length = alone.tokens.size(1)
        assert together.live[row].sum() == length  # the batch of one stops as soon as it can
        assert torch.allclose(together.tokens[row, :length], alone.tokens[0], atol=1e-12)
        assert torch.allclose(together.cost[row], alone.cost[0], atol=1e-12)


def test_equal_entries_are_read_together():
    """Uniform weights 1/K: K entries a token, and the tape is as long as it may be."""
    reader = make(num_tokens=10, threshold=2.0)
    bank = torch.randn(3, WIDTH, dtype=torch.float64)[torch.arange(60) % 3].unsqueeze(0)
    reading = reader(bank[:, 1] + 0.01, bank)
    assert reading.live.sum() == 10
    assert torch.allclose(reading.weights, torch.full_like(reading.weights, 0.2))
    assert set((reading.entries[0, :4] % 3).flatten().tolist()) == {1}  # 20 entries are alike, 4 tokens of 5
    assert torch.allclose(reading.cost, torch.tensor([10 * (1 - 5 * 0.04)], dtype=torch.float64))


def test_an_entry_is_read_once():
    entries = make(0.3, num_tokens=6, threshold=1.5)(*make_inputs()).entries.flatten(1)
    for row in entries.tolist():
        read = [entry for entry in row if entry >= 0]
        assert len(read) == len(set(read))


def test_padding_entries_are_never_read():
    reader = make(0.5, allow_exhausted=True)
    query, bank = make_inputs(rows=3)
    padding = torch.arange(ENTRIES) >= torch.tensor([[ENTRIES], [9], [1]])
    poisoned = bank.detach().masked_fill(padding.unsqueeze(-1), torch.nan).requires_grad_()
    reading = reader(query, poisoned, padding)
    for row, length in enumerate((ENTRIES, 9, 1)):
        tokens, cost, places = read_one(reader, query[row], bank[row, :length])
        assert torch.allclose(reading.tokens[row, : len(tokens)], torch.stack(tokens), atol=1e-12)
        assert torch.allclose(reading.cost[row], torch.as_tensor(cost).double(), atol=1e-12)
        assert [[i for i in token if i >= 0] for token in reading.entries[row, : len(tokens)].tolist()] == places
        assert reading.live[row].sum() == len(tokens)
    (reading.tokens.sum() + reading.cost.sum()).backward()
    assert poisoned.grad.isfinite().all() and query.grad.isfinite().all()


def test_bank_that_can_be_exhausted_is_refused():
    query, bank = make_inputs(entries=17)
    with pytest.raises(UsageError, match="bank of 17 entries.*6 tape tokens of 3 entries.*18 entries"):
        make()(query, bank)
    padding = torch.zeros(7, ENTRIES, dtype=torch.bool)
    padding[2, 5:] = True
    with pytest.raises(UsageError, match="bank of 5 entries"):
        make()(query, make_inputs()[1], padding)
    reading = make(0.1, allow_exhausted=True)(query, bank)  # 5 tokens of 3 entries, and one of the 2 that are left
    assert reading.live.sum(1).max() == 6 and reading.tokens.isfinite().all()
    assert torch.allclose(reading.weights.sum(-1)[reading.live], torch.ones((), dtype=torch.float64))


@pytest.mark.parametrize(
    "settings, message",
    (
        ({"threshold": 0.0}, "more than 0"),
        ({"threshold": 7.0}, "at most the 6"),
        ({"key_dim": 9}, "1 to 8"),
        ({"cost": "gini"}, "choose one of entropy, max"),
        ({"query_update": "sum"}, "average, replace"),
    ),
)
def test_refuses_settings(settings, message):
    with pytest.raises(UsageError, match=message):
        make(**settings)


def test_noise_and_dropout_only_in_training():
    reader = make(query_noise=1.0, bank_dropout=0.5, allow_exhausted=True)
    query, bank = make_inputs()
    assert torch.equal(reader(query, bank).tokens, reader(query, bank).tokens)
    reader.train()
    first, second = reader(query, bank), reader(query, bank)
    assert first.tokens.shape != second.tokens.shape or not torch.equal(first.tokens, second.tokens)


def test_empty_batch():
    reading = make()(torch.zeros(0, WIDTH).double(), torch.zeros(0, ENTRIES, WIDTH).double())
    assert reading.tokens.shape[0] == 0 and reading.cost.shape == (0,)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_half_precision(dtype):
    query, bank = make_inputs()
    exact = make()(query, bank)
    half = make().to(dtype)(query.to(dtype), bank.to(dtype))
    assert half.tokens.dtype == dtype and half.cost.dtype == torch.float32
    assert (half.cost - exact.cost).abs().max() < 0.3  # a near tie may fall otherwise


def test_tape_is_appended_and_masked():
    tape = Tape(make(1.5), GatedMLP(WIDTH, 5).double())
    query, bank = make_inputs(rows=3)
    x = torch.randn(4, 3, WIDTH, dtype=torch.float64)
    padding = torch.arange(4) >= torch.tensor([[4], [2], [3]])
    longer, mask, reading = tape(x, padding, bank)
    assert torch.equal(longer[:4], x) and torch.equal(mask[:, :4], padding) and torch.equal(mask[:, 4:], ~reading.live)
    poisoned, _, again = tape(x.masked_fill(padding.T.unsqueeze(-1), torch.nan), padding, bank)
    assert torch.equal(again.tokens, reading.tokens) and torch.equal(poisoned[4:], longer[4:])
    assert torch.allclose(masked_mean(x, padding)[1], x[:2, 1].mean(0))
    assert not longer[4:].transpose(0, 1)[~reading.live].any()
    with pytest.raises(UsageError, match="mean, first"):
        Tape(make(), query="last")


@pytest.mark.parametrize("query", ("first", "mean"))
def test_padding_on_the_left_is_not_read(query):
    """fairseq pads sources on the left: the first state is that of the first token."""
    tape, bank = Tape(make(), query=query), make_inputs(shared=True)[1]
    torch.manual_seed(6)
    x, blank = torch.randn(3, 2, WIDTH, dtype=torch.float64), torch.full((2, 2, WIDTH), 9.0, dtype=torch.float64)
    none, padding = torch.zeros(2, 3, dtype=torch.bool), torch.ones(2, 2, dtype=torch.bool)
    alone = tape.read(x, none, bank)
    for states, mask in (((blank, x), (padding, none)), ((x, blank), (none, padding))):
        torch.testing.assert_close(tape.read(torch.cat(states), torch.cat(mask, 1), bank).appended, alone.appended)


def test_banks():
    assert LearnedBank(50, WIDTH)().shape == (50, WIDTH)
    equal = InputBank(3, WIDTH)(torch.ones(2, 5, 3))
    assert torch.equal(equal[:, :1].expand_as(equal), equal)
    placed = InputBank(3, WIDTH, positions=5)(torch.ones(2, 5, 3))
    assert not torch.equal(placed[:, 0], placed[:, 1])
    with pytest.raises(UsageError, match="4 bank entries.*5 positions"):
        InputBank(3, WIDTH, positions=5)(torch.ones(2, 4, 3))


# What the public JAX code (scenic, projects/adatape, layers.py: AdaTapeEncoder) gives for a batch of one, with inputs
# and weights from wave(): two blocks, 2 heads, MLPs of 11, tape MLP of 5, tape MLPs in the blocks of 7, tape of 6.
JAX = json.loads((Path(__file__).parent / "data" / "adatape_jax.json").read_text())


def wave(*shape, seed, scale=1.0):
    count = 1 + np.arange(math.prod(shape))
    return torch.from_numpy((scale * np.sin(seed * count**1.5)).reshape(shape).astype(np.float32))


def jax_weight(name, *shape, sharp=1.0):
    value = wave(*shape, seed=0.1 + (sum(map(ord, f"params/{name}")) % 97) / 50, scale=0.4)
    return (1 + value) * sharp if name.endswith("scale") else value * 1.0


def load_jax(module, name, sharp=1.0):
    """Fills a LayerNorm, or a Linear of flax's Dense or DenseGeneral, whose kernel lies input first."""
    with torch.no_grad():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6
            module.weight.copy_(jax_weight(f"{name}/scale", *module.weight.shape, sharp=sharp))
        else:
            module.weight.copy_(jax_weight(f"{name}/kernel", *module.weight.T.shape).T)
        module.bias.copy_(jax_weight(f"{name}/bias", *module.bias.shape))


@pytest.mark.parametrize("case", JAX, ids=lambda case: " ".join(str(case[key]) for key in list(case)[:4]))
def test_equals_the_public_code_on_a_batch_of_one(case):
    cfg = TransformerConfig.from_namespace(
        SimpleNamespace(
            encoder_embed_dim=8,
            encoder_ffn_embed_dim=11,
            encoder_attention_heads=2,
            encoder_normalize_before=True,
            activation_fn="gelu_accurate",
            dropout=0.0,
        )
    )
    cfg.tape_ffn_embed_dim = 7
    update = "average" if case["average"] else "replace"
    tape = Tape(TapeReader(8, 6, 2.0, 4, case["cost"], update), GatedMLP(8, 5))
    load_jax(tape.reader.norm, "AddTapeToken_0/TapeBank_0/bank_norm", case["sharp"])
    load_jax(tape.mlp.fc1, "AddTapeToken_0/MlpBlock_0/Dense_0")
    load_jax(tape.mlp.fc2, "AddTapeToken_0/MlpBlock_0/Dense_1")
    layers = LayerStack([EncoderLayer(cfg), EncoderLayer(cfg)], (0, 1), pass_depth=True).eval()
    for number, layer in enumerate(layers.children()):
        block = f"encoderblock_{number}"
        load_jax(layer.self_attn_layer_norm, f"{block}/LayerNorm_0")
        load_jax(layer.final_layer_norm, f"{block}/LayerNorm_1")
        for ours, theirs in ("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"), ("out_proj", "out"):
            load_jax(getattr(layer.self_attn, ours), f"{block}/MultiHeadDotProductAttention_0/{theirs}")
        for mlp, name in (layer, "MlpBlock_0"), (layer.tape_ffn, "tape_mlp"):
            load_jax(mlp.fc1, f"{block}/{name}/Dense_0")
            load_jax(mlp.fc2, f"{block}/{name}/Dense_1")
    norm = nn.LayerNorm(8)
    load_jax(norm, "encoder_norm")
    if case["bank"] == "input":
        bank = wave(1, 24, 8, seed=0.3)
    else:
        bank = jax_weight("AddTapeToken_0/TapeBank_0/tape_tokens", 24, 8)
    x, _, reading = run_tape(layers, wave(1, 3, 8, seed=0.7).transpose(0, 1), None, tape, bank)
    x = norm(x)[:, 0]
    assert reading.live.sum() == case["tape_len"] == len(x) - 3
    assert reading.cost.item() == pytest.approx(case["ponder"], abs=1e-5)
    assert torch.allclose(x[0], torch.tensor(case["first"]), atol=2e-5)
    assert torch.allclose(x[-1], torch.tensor(case["last"]), atol=2e-5)

"""Attention with skimmed tokens against its definition, by value and by gradient, on every backend."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fairseq_adaptive.ops.skim_attention import Sequences, sequences, skim_attention
from fairseq_adaptive.ops.skim_attention.naive import masked_softmax
from fairseq_adaptive.ops.skim_attention.naive import skim_attention as definition

NAMES = ("out", "query", "key", "value", "kept")
# rows of the sequences, heads, width of a head
SHAPES = [([1], 1, 3), ([63], 2, 8), ([7, 3, 7, 0, 1, 6], 3, 5), ([500, 63, 1, 480], 2, 4), ([5, 5, 5], 2, 6)]


def inputs(lengths, heads, dim, dtype=torch.float32, mask="hard"):
    torch.manual_seed(3)
    rows = sum(lengths)
    query, key, value = (torch.randn(rows, heads, dim, dtype=dtype) for _ in range(3))
    exact = torch.promote_types(dtype, torch.float32)
    if mask == "hard":
        kept = (torch.rand(rows) < 0.5).to(exact)
    else:
        kept = torch.zeros(rows, dtype=exact) if mask == "none" else None
    return query, key, value, kept


def results(function, query, key, value, kept, lengths, **options):
    """The output and every gradient by name."""
    leaves = [None if each is None else each.detach().clone().requires_grad_() for each in (query, key, value, kept)]
    out = function(*leaves[:3], lengths, leaves[3], **options)
    torch.manual_seed(5)
    wanted = [leaf for leaf in leaves if leaf is not None]
    grads = torch.autograd.grad(out, wanted, torch.randn(out.shape).to(out))
    return dict(zip(NAMES, (out.detach(), *grads)))


def ours(query, key, value, lengths, kept=None, **options):
    return skim_attention(query, key, value, Sequences(torch.tensor(lengths)), kept, **options)


def small(lengths, backend):
    return [min(length, 20) for length in lengths] if backend == "triton" else lengths


@pytest.mark.parametrize("mask", ("hard", "none", "all"))
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_its_definition(shape, mask, backend):
    lengths = small(shape[0], backend)
    args = (*inputs(lengths, *shape[1:], mask=mask), lengths)
    found, expected = results(ours, *args), results(definition, *args)
    for name in expected:
        close = {"rtol": 2e-5, "atol": 2e-5, "msg": lambda text: f"{name}: {text}"}
        torch.testing.assert_close(found[name], expected[name], **close)


@torch.no_grad()
def test_without_a_gradient(backend):
    args = inputs([7, 3], 2, 4)
    torch.testing.assert_close(ours(*args[:3], [7, 3], args[3]), definition(*args[:3], [7, 3], args[3]))


def test_no_rows(backend):
    found = results(ours, *inputs([0, 0], 2, 4), [0, 0])
    assert {name: each.shape for name, each in found.items()} == {**dict.fromkeys(NAMES, (0, 2, 4)), "kept": (0,)}


def test_double_precision():
    lengths = [7, 3, 7, 0, 1, 6]
    args = (*inputs(lengths, 3, 5, torch.float64), lengths)
    torch.testing.assert_close(results(ours, *args), results(definition, *args))
    *parts, kept = (each.requires_grad_() for each in args[:4])
    assert torch.autograd.gradcheck(lambda *parts: ours(*parts, lengths, kept.detach()), parts)


@pytest.mark.parametrize("limit", ("LARGEST", "WASTED"))
def test_pieces_do_not_matter(monkeypatch, limit):
    """Heads one by one, or sequences one by one."""
    lengths = [9, 8, 3, 9]
    args = (*inputs(lengths, 4, 6, torch.float64), lengths)
    expected = results(ours, *args)
    monkeypatch.setattr(sequences, limit, 0)
    monkeypatch.setattr("fairseq_adaptive.ops.skim_attention.eager.LARGEST", sequences.LARGEST)
    torch.testing.assert_close(results(ours, *args), expected)


def test_sequences_of_about_the_same_length_are_computed_together():
    together = Sequences(torch.tensor([512, 30, 500, 0, 29, 512])).pieces(12)
    assert [(piece.count, piece.length) for piece in together] == [(1, 512), (1, 512), (1, 500), (2, 30)]
    assert sum(len(piece.filled) for piece in together if piece.filled is not None) == 59


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision(dtype, backend):
    """Close to the exact result; the softmax and what the mask is told are not in half precision."""
    lengths = small([300, 40, 33], backend)
    args = inputs(lengths, 2, 8, dtype)
    exact = results(definition, *(each.double() for each in args), lengths)
    found = results(ours, *args, lengths)
    assert found["kept"].dtype == torch.float32 and found["query"].dtype == dtype
    for name in NAMES:
        difference = (found[name].double() - exact[name]).norm() / exact[name].norm()
        assert difference < 4 * torch.finfo(dtype).eps, name


def test_dropout_is_the_same_in_both_passes(backend):
    """With the mask that was drawn, found by values of one, the definition has the same gradients."""
    lengths = [17, 12]
    query, key, _, kept = inputs(lengths, 2, 20)
    value = torch.zeros(29, 2, 20)
    for first, length in ((0, 17), (17, 12)):
        value[first : first + length, :, :length] = torch.eye(length)[:, None]
    torch.manual_seed(7)
    found = results(ours, query, key, value, kept, lengths, dropout=0.4)

    def with_mask(query, key, value, lengths, kept):
        outputs, start = [], 0
        for length in lengths:
            rows = slice(start, start + length)
            q, k, v = (each[rows].transpose(0, 1) for each in (query, key, value))
            weights = masked_softmax(q @ k.transpose(1, 2) * q.size(-1) ** -0.5, kept[rows])
            dropped = found["out"][rows, :, :length].transpose(0, 1)  # weights times mask
            mask = (dropped != 0) / 0.6
            # of a weight of 0 the output does not tell: the gradient of its key is left out below
            outputs.append((weights * mask @ v).transpose(0, 1))
            start += length
        return torch.cat(outputs)

    expected = results(with_mask, query, key, value, kept, lengths)
    for name in NAMES[:4]:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-4)
    seen = kept > 0
    torch.testing.assert_close(found["kept"][seen], expected["kept"][seen], rtol=1e-4, atol=1e-4)
    share = (found["out"][:17, :, :17].transpose(1, 2)[:, kept[:17] > 0] == 0).float().mean()
    assert 0.3 < share < 0.5


def test_dropout_keeps_the_expectation_and_draws_anew(backend):
    query, key, value, _ = inputs([20], 2, 8)
    torch.manual_seed(1)
    first, second = (ours(query, key, value, [20], dropout=0.5) for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(first, ours(query, key, value, [20], dropout=0.5)) and not torch.equal(first, second)
    mean = sum(ours(query, key, value, [20], dropout=0.5) for _ in range(60 if backend == "torch" else 8)) / (
        60 if backend == "torch" else 8
    )
    error = (mean - ours(query, key, value, [20])).norm() / ours(query, key, value, [20]).norm()
    assert error < (0.3 if backend == "torch" else 0.7)


def test_nothing_depends_on_strides_or_on_what_memory_holds(backend, monkeypatch):
    lengths = [9, 4]
    query, key, value, kept = inputs(lengths, 2, 6)
    expected = results(ours, query, key, value, kept, lengths)
    wide = torch.full((13, 3, 2, 12), float("nan"))
    for place, each in enumerate((query, key, value)):
        wide[:, place, :, ::2] = each
    poisoned = lambda *args, **kwargs: torch.full_like(empty(*args, **kwargs), float("nan"))  # noqa: E731
    empty, empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: empty_like(*args, **kwargs).fill_(float("nan")))
    leaves = [each.requires_grad_() for each in (wide[:, 0, :, ::2], wide[:, 1, :, ::2], wide[:, 2, :, ::2])]
    mask = kept.clone().requires_grad_()
    out = ours(*leaves, lengths, mask)
    torch.manual_seed(5)
    grads = torch.autograd.grad(out, (*leaves, mask), torch.randn(out.shape))
    for name, each in zip(NAMES, (out, *grads)):
        torch.testing.assert_close(each.detach(), expected[name])


def test_masked_softmax_is_exact_for_hard_masks():
    torch.manual_seed(1)
    scores = 3 * torch.randn(2, 3, 7, 7, dtype=torch.float64)
    scores[..., 2] += 1000.0  # a skimmed key, by far the strongest
    kept = torch.tensor([[1, 1, 0, 1, 0, 1, 0], [0, 1, 0, 1, 1, 1, 1]], dtype=torch.float64)
    weights = masked_softmax(scores, kept[:, None])
    for row in range(2):
        seen = kept[row].bool().expand(7, 7) | torch.eye(7, dtype=torch.bool)
        expected = scores[row].masked_fill(~seen, float("-inf")).softmax(-1)
        assert torch.equal(weights[row] == 0, expected == 0)
        torch.testing.assert_close(weights[row], expected, rtol=0, atol=1e-15)
    assert masked_softmax(scores.bfloat16(), kept[:, None]).dtype == torch.float32


def test_masked_softmax_gradients():
    torch.manual_seed(2)
    scores = torch.randn(2, 2, 5, 5, dtype=torch.float64, requires_grad=True)
    kept = torch.rand(2, 1, 5, dtype=torch.float64).add(0.1).requires_grad_()
    assert torch.autograd.gradcheck(masked_softmax, (scores, kept))

    # what a skimmed key would have contributed to a query that stays: e^(a_j - logsumexp of the kept) (v_j - out), with
    # a_j at most that of the strongest kept key
    kept = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0], dtype=torch.float64, requires_grad=True)
    values = torch.randn(5, dtype=torch.float64)
    out = masked_softmax(scores[:1, :1], kept)[0, 0, 0] @ values
    gradient = torch.autograd.grad(out, kept)[0]
    row = scores[0, 0, 0].detach()
    capped = row.clamp(max=row[[0, 2, 4]].max())
    expected = (capped - row[[0, 2, 4]].logsumexp(0)).exp() * (values - out.detach())
    torch.testing.assert_close(gradient[1:], expected[1:])
    assert gradient[0] == 0  # the query itself is always seen


def test_a_skimmed_key_promises_no_more_than_the_strongest_kept_one(backend):
    """One that is 1000 stronger than all others does not drown the gradient, nor what is kept."""
    query, key, value, _ = inputs([6], 1, 4)
    key[2] *= 1000
    kept = torch.tensor([1.0, 1, 0, 1, 1, 1])
    found, expected = (results(each, query, key, value, kept, [6]) for each in (ours, definition))
    for name in NAMES:
        assert found[name].isfinite().all()
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-4)


def test_products_are_counted(backend):
    query, key, value, kept = inputs([10, 4], 2, 8)
    with FlopCounterMode(display=False) as counter:
        results(ours, query, key, value, kept, [10, 4])
    rows = 2 * 10**2 if backend == "torch" else 10**2 + 4**2  # there the two are one piece, with padding
    assert counter.get_total_flops() == 7 * 2 * 2 * 8 * rows


def test_training_ends_as_with_the_definition(monkeypatch):
    losses = []
    for function in (ours, definition):
        torch.manual_seed(2)
        maps = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3))
        gate, x = torch.nn.Linear(8, 1), torch.randn(24, 8)
        optimizer = torch.optim.Adam([*maps.parameters(), *gate.parameters()], 0.05)
        for _ in range(15):
            kept = torch.sigmoid(gate(x)).squeeze(-1)
            hard = (kept > 0.5).float() + kept - kept.detach()
            out = function(*(each(x).view(24, 2, 4) for each in maps), [14, 10], hard)
            loss = (out.flatten(1) - x.flip(0)).square().mean() + 0.1 * hard.mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0] < 1.0

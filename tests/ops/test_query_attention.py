"""Relative attention of some positions, at any places and with hidden keys, against its definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from fairseq_adaptive.ops.matmul import LEAST
from fairseq_adaptive.ops.relative_attention import eager, hidden, naive, queries, step


def inputs(heads, groups, queried, length, width, seed=1, dtype=torch.float64, share=0.6):
    """Operands, places in ascending order, each once, and who is seen."""
    torch.manual_seed(seed)
    shapes = (heads, groups, queried, width), *[(heads, groups, length, width)] * 2, (heads, length + 1, width)
    operands = [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in (*shapes, *[(heads, width)] * 2)]
    place = torch.stack([torch.randperm(length)[:queried].sort().values for _ in range(groups)])
    return operands, place, torch.rand(groups, length) < share


def test_definition_is_that_of_all_positions():
    """Where the last positions ask, and where each asks alone."""
    operands, _, _ = inputs(2, 3, 4, 9, 5)
    place = torch.arange(5, 9).expand(3, -1)
    for window in (None, 3):
        expected = naive.relative_attention(*operands, window)
        torch.testing.assert_close(naive.query_attention(*operands, place, window), expected)
        for each in range(4):
            length = 6 + each
            part = [operands[0][:, :, each : each + 1], *(x[:, :, :length] for x in operands[1:3])]
            alone = naive.relative_attention(*part, operands[3][:, 9 - length :], *operands[4:], window)
            torch.testing.assert_close(expected[:, :, each : each + 1], alone)


def test_hidden_keys_have_no_influence_except_on_their_own_query():
    operands, place, seen = inputs(2, 3, 4, 9, 5)
    expected = naive.query_attention(*operands, place, None, seen)
    for group in range(3):
        own = torch.zeros(9, dtype=torch.bool).index_fill_(0, place[group], True)
        operands[1][:, group, ~seen[group] & ~own] = 1e3
        operands[2][:, group, ~seen[group] & ~own] = 1e3
    torch.testing.assert_close(naive.query_attention(*operands, place, None, seen), expected)
    assert not torch.allclose(naive.query_attention(*operands, place), expected)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    sizes=st.tuples(*(st.integers(1, most) for most in (3, 4, 9))),
    more=st.integers(0, 12),
    width=st.integers(1, 9),
    window=st.one_of(st.none(), st.integers(1, 12)),
    piece=st.sampled_from((1, 20, 100, 2**19)),
    hides=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_random_cases_in_double_precision(sizes, more, width, window, piece, hides, seed):
    operands, place, seen = inputs(*sizes, sizes[2] + more, width, seed)
    seen = seen if hides else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eager, "PIECE", piece)
        ours = queries.attend(*operands, place, window, seen)
    expected = naive.query_attention(*operands, place, window, seen)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("hides, window", [(False, None), (True, None), (True, 4)])
@pytest.mark.parametrize("size", [(1, 1, 1, 1, 1), (2, 2, 5, 18, 16), (1, 1, 19, 40, 17), (3, 1, 1, 40, 4)], ids=str)
def test_every_backend(size, hides, window, backend, monkeypatch):
    if backend == "triton":
        from fairseq_adaptive.ops.relative_attention import triton

        monkeypatch.setattr(triton, "BLOCK", 16)
    operands, place, seen = inputs(*size, dtype=torch.float32)
    seen = seen if hides else None
    expected = naive.query_attention(*operands, place, window, seen)
    torch.testing.assert_close(queries.attend(*operands, place, window, seen), expected, rtol=2e-5, atol=2e-5)
    turned = [each.transpose(0, -1).contiguous().transpose(0, -1) for each in operands]
    torch.testing.assert_close(queries.attend(*turned, place, window, seen), expected, rtol=2e-5, atol=2e-5)
    if size[2] > 8:
        return
    half = [each.bfloat16() for each in operands]
    exact = naive.query_attention(*(each.double() for each in half), place, window, seen)
    ours = queries.attend(*half, place, window, seen)
    assert ours.dtype == torch.bfloat16 and (ours.double() - exact).norm() < 0.05 * exact.norm()


def test_what_is_in_memory_plays_no_part(backend, poisoned):
    operands, place, seen = inputs(2, 2, 3, 9, 4, dtype=torch.float32)
    expected = naive.query_attention(*operands, place, 5, seen)
    torch.testing.assert_close(queries.attend(*operands, place, 5, seen), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("sizes", [(2, 0, 3), (2, 3, 0), (0, 2, 3)], ids=str)
def test_nothing_to_attend(sizes, backend):
    operands, place, seen = inputs(2, 3, 3, 8, 4, dtype=torch.float32)
    heads, groups, queried = sizes
    cut = [operands[0][:heads, :groups, :queried], *(x[:heads, :groups] for x in operands[1:3]), operands[3][:heads]]
    out = queries.attend(*cut, *(x[:heads] for x in operands[4:]), place[:groups, :queried], None, seen[:groups])
    assert out.shape == (heads, groups, queried, 4)


@pytest.mark.parametrize("backend", ["torch"], indirect=True)
def test_large_products(backend):
    """oneDNN's path, and several pieces of their real size."""
    operands, place, seen = inputs(2, 3, 100, 1400, 40)
    assert 100 * 1400 * 40 > LEAST and 3 * 100 * 1400 > 2**18
    expected = naive.query_attention(*operands, place, None, seen)
    single = [each.float() for each in operands]
    torch.testing.assert_close(queries.attend(*operands, place, None, seen), expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(queries.attend(*single, place, None, seen).double(), expected, rtol=1e-4, atol=1e-4)


class LargestIndex(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor) and output.dtype == torch.int64:
            self.elements = max(self.elements, output.numel())
        return output


@pytest.mark.parametrize("backend", ["torch"], indirect=True)
def test_no_index_has_the_size_of_the_scores(backend):
    operands, place, seen = inputs(2, 2, 8, 64, 4, dtype=torch.float32)
    with LargestIndex() as largest:
        queries.attend(*operands, place, None, seen)
    assert largest.elements <= 64 < 2 * 8 * 64


@pytest.mark.parametrize("window", (None, 3))
def test_hiding_is_differentiable(window):
    """By value and by every gradient; that of what is seen against finite differences."""
    operands, _, seen = inputs(2, 3, 4, 7, 3)
    place, leaves = torch.arange(3, 7).expand(3, -1), [each.clone().requires_grad_() for each in operands]
    expected = naive.query_attention(*leaves, place, window, seen)
    factor = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * factor).sum(), leaves)
    for mask in (seen, seen.double(), seen.double().requires_grad_()):
        out = hidden.attend(*leaves, mask, window)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
        for ours, theirs in zip(torch.autograd.grad((out * factor).sum(), leaves), wanted):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)
    mask = torch.rand(3, 7, dtype=torch.float64).add_(0.2).requires_grad_()
    assert torch.autograd.gradcheck(lambda mask: hidden.attend(*operands, mask, window), mask)


def test_one_position():
    operands, _, seen = inputs(2, 3, 1, 7, 3)
    place = torch.full((3, 1), 6)
    for mask in (None, seen):
        torch.testing.assert_close(
            step.attend(*operands, mask), naive.query_attention(*operands, place, None, mask), rtol=0, atol=1e-12
        )

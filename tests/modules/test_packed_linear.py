"""nn.Linear with weights laid out once: same results, never old weights."""

import copy

import pytest
import torch
from torch import nn

from fairseq_adaptive.modules.packed_linear import PackedLinear


@pytest.fixture
def pair():
    torch.manual_seed(1)
    plain = nn.Sequential(nn.Linear(96, 301), nn.ReLU(), nn.Linear(301, 64, bias=False))
    packed = copy.deepcopy(plain)
    PackedLinear.adopt(packed)
    return plain, packed


@pytest.mark.parametrize("rows", ((3,), (200,), (7, 31)), ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16), ids=str)
def test_equals_linear(pair, rows, dtype):
    plain, packed = (each.to(dtype) for each in pair)
    x = torch.randn(*rows, 96, dtype=dtype)
    with torch.no_grad():
        torch.testing.assert_close(packed(x), plain(x), rtol=1e-5, atol=1e-5)
        strided = torch.randn(96, 200, dtype=dtype).t()
        torch.testing.assert_close(packed(strided), plain(strided), rtol=1e-5, atol=1e-5)
    assert list(packed.state_dict()) == list(plain.state_dict())


def test_big_products_take_packed_weights(pair):
    _, packed = pair
    with torch.no_grad():
        packed(torch.randn(3, 96))
        assert packed[0].packed()._packed is None
        packed(torch.randn(200, 96))
    assert packed[0].packed()._packed is not None


def test_follows_its_weights(pair):
    """A checkpoint loaded later, another precision, a copy."""
    plain, packed = pair
    x = torch.randn(200, 96)
    with torch.no_grad():
        packed(x)
        for weight in plain.parameters():
            weight.mul_(2)
        packed.load_state_dict(plain.state_dict())
        torch.testing.assert_close(packed(x), plain(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(copy.deepcopy(packed)(x), plain(x), rtol=1e-5, atol=1e-5)
        assert packed.double()(x.double()).dtype == torch.float64


def test_has_gradients(pair):
    plain, packed = pair
    x = torch.randn(200, 96)
    for each in pair:
        each(x).sin().sum().backward()
    for ours, theirs in zip(packed.parameters(), plain.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad)

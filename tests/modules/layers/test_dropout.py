import pytest
import torch
from fairseq.modules import FairseqDropout

from fairseq_adaptive.modules.layers.dropout import FastDropout, quicken_dropout


@pytest.mark.parametrize("p", (0.1, 0.5, 0.9))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_share_scale_and_gradient(p, dtype):
    torch.manual_seed(1)
    x = torch.ones(301, 997, dtype=dtype, requires_grad=True)
    y = FastDropout(p).train()(x)
    assert y.dtype == dtype and y.shape == x.shape
    kept = y != 0
    assert kept.double().mean().item() == pytest.approx(1 - p, abs=4 * (p * (1 - p) / x.numel()) ** 0.5)
    expected = torch.full_like(y[kept], 1 / (1 - p))
    torch.testing.assert_close(y[kept], expected, rtol=1e-4 if dtype == torch.float32 else 1e-2, atol=0)
    assert kept.double().mean(0).std() > 0 and kept.double().mean(1).std() > 0
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


def test_neighbours_are_independent():
    """Four elements share a random number of 64 bits."""
    torch.manual_seed(1)
    kept = (FastDropout(0.5).train()(torch.ones(100_000, 4)) != 0).double()
    correlation = torch.corrcoef(kept.T) - torch.eye(4)
    assert correlation.abs().max() < 4 / 100_000**0.5


@pytest.mark.parametrize("shape", ((), (1,), (0, 3), (3, 5, 7)))
def test_sizes(shape):
    assert FastDropout(0.3).train()(torch.ones(shape)).shape == shape


@pytest.mark.parametrize("p, value", ((0.0, 1), (1.0, 0)))
def test_all_or_nothing(p, value):
    assert FastDropout(p).train()(torch.ones(50)).eq(value).all()


def test_takes_fairseqs_place():
    model = torch.nn.Sequential(FairseqDropout(0.5, module_name="Some"), torch.nn.Dropout(0.5))
    quicken_dropout(model)
    assert [type(each) for each in model] == [FastDropout, torch.nn.Dropout]
    x = torch.ones(50)
    assert model.eval()(x) is x
    model[0].make_generation_fast_("some", retain_dropout=True)
    assert model[0].eval()(x).unique().tolist() == [0, 2]
    torch.manual_seed(3)
    first = model[0](x)
    torch.manual_seed(3)
    assert torch.equal(first, model[0](x))

"""The fused loss against its definition, which is checked against fairseq's, by value and by gradient."""

import pytest
import torch
from fairseq.criterions.label_smoothed_cross_entropy import label_smoothed_nll_loss
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fairseq_adaptive.ops import label_smoothed_cross_entropy
from fairseq_adaptive.ops.cross_entropy import naive
from fairseq_adaptive.ops.cross_entropy.chunked import CHUNK
from fairseq_adaptive.ops.matmul import LEAST, linear


SIZES = [(1, 2, 1), (63, 97, 5), (CHUNK, 33, 8), (CHUNK + 1, 211, 16), (1000, 50, 7), (5, 5003, 3)]
INTERPRETED = 5  # rows, of which Triton's interpreter does 50 in a second
NAMES = ("loss", "nll", "right", "hidden", "weight", "bias")


def rows_of(rows, backend, device):
    return min(rows, INTERPRETED) if backend == "triton" and device == "cpu" else rows


def inputs(rows, words, width, dtype=torch.float32, bias=True):
    hidden, weight = torch.randn(rows, width, dtype=dtype), torch.randn(words, width, dtype=dtype) / width**0.5
    target = torch.randint(words, (rows,))
    return hidden, weight, target, torch.randn(words, dtype=dtype) if bias else None


def results(function, hidden, weight, target, bias, smoothing, factor=1.0, **kwargs):
    """Every output and every gradient by name."""
    leaves = [None if each is None else each.clone().requires_grad_() for each in (hidden, weight, bias)]
    loss, nll, right = function(leaves[0], leaves[1], target, smoothing, leaves[2], **kwargs)
    (loss * factor).backward()
    grads = [None if leaf is None else leaf.grad for leaf in leaves]
    return dict(zip(NAMES, (loss.detach(), nll, right, *grads)))


def fused(*args, **kwargs):
    return label_smoothed_cross_entropy(*args, **kwargs, count=True)


@pytest.mark.parametrize("smoothing", (0.0, 0.1))
def test_definition_is_fairseqs(smoothing):
    hidden, weight, target, bias = inputs(63, 97, 5)
    log_probs = torch.nn.functional.linear(hidden, weight, bias).log_softmax(-1)
    expected = label_smoothed_nll_loss(log_probs, target, smoothing)
    loss, nll, right = naive.label_smoothed_cross_entropy(hidden, weight, target, smoothing, bias)
    torch.testing.assert_close((loss, nll), expected)
    assert right == (log_probs.argmax(-1) == target).sum()


@pytest.mark.parametrize("smoothing", (0.0, 0.1))
@pytest.mark.parametrize("size", SIZES)
def test_equals_its_definition(size, smoothing, backend, device):
    rows, words, width = size
    args = (*inputs(rows_of(rows, backend, device), words, width), smoothing, 0.37)
    ours, expected = results(fused, *args), results(naive.label_smoothed_cross_entropy, *args)
    for name in NAMES:
        torch.testing.assert_close(ours[name], expected[name], rtol=2e-5, atol=2e-5, msg=lambda text: f"{name}: {text}")


def test_double_precision():
    args = (*inputs(CHUNK + 1, 50, 7, torch.float64), 0.1)
    torch.testing.assert_close(results(fused, *args), results(naive.label_smoothed_cross_entropy, *args))


def test_one_backward_pass():
    hidden, weight, target, _ = inputs(7, 5, 3)
    loss = label_smoothed_cross_entropy(hidden.requires_grad_(), weight, target)[0]
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="for one backward pass only"):
        loss.backward()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("autocast", (False, True))
def test_half_precision(dtype, autocast, backend, device):
    """Close to the exact result, with a loss beyond the largest float16; under autocast with fp32 gradients."""
    hidden, weight, target, bias = inputs(rows_of(CHUNK + 99, backend, device), 211, 16)
    bias[:50] -= 200.0  # all targets are improbable
    hidden, weight, target, bias = hidden.to(dtype), weight.to(dtype), target % 50, bias.to(dtype)
    double = hidden.double(), weight.double(), target, bias.double()
    exact = results(naive.label_smoothed_cross_entropy, *double, 0.1)
    kept = (hidden, weight, target, bias)
    if autocast:
        kept = (hidden.float(), weight.float(), target, bias.float())
    with torch.autocast(device, dtype=dtype, enabled=autocast):
        ours = results(fused, *kept, 0.1)
    assert exact["loss"] > torch.finfo(torch.float16).max or len(hidden) == INTERPRETED
    assert ours["loss"].dtype == torch.float32 and ours["weight"].dtype == kept[1].dtype
    assert ours["loss"].item() == pytest.approx(exact["loss"].item(), rel=2e-3)
    step = torch.finfo(dtype).eps
    for name in ("hidden", "weight", "bias"):
        difference = (ours[name].double() - exact[name]).norm() / exact[name].norm()
        assert difference < 4 * step, name


def test_nothing_depends_on_strides(backend):
    hidden, weight, target, bias = inputs(INTERPRETED, 97, 5)
    strided = torch.full((INTERPRETED, 10), float("nan"))
    strided[:, ::2] = hidden
    expected = results(fused, hidden, weight, target, bias, 0.1)
    ours = results(fused, strided[:, ::2], weight.t().contiguous().t(), target, bias, 0.1)
    for name in NAMES:
        torch.testing.assert_close(ours[name], expected[name])


def test_no_rows(backend):
    hidden, weight, target, bias = inputs(0, 97, 5)
    ours = results(fused, hidden, weight, target, bias, 0.1)
    assert ours["loss"] == ours["nll"] == ours["right"] == 0
    assert ours["hidden"].shape == (0, 5) and ours["weight"].eq(0).all() and ours["bias"].eq(0).all()


def test_improbable_words(backend):
    """A word whose probability is 0 in float32 has a finite loss, and scores without bound do no harm."""
    hidden, weight = torch.tensor([[1.0], [1.0]]), torch.tensor([[3e4], [0.0], [-3e4]])
    ours = results(fused, hidden, weight, torch.tensor([2, 0]), None, 0.0)
    assert ours["loss"] == 6e4 and ours["right"] == 1
    torch.testing.assert_close(ours["weight"], torch.tensor([[1.0], [0.0], [-1.0]]))


def test_no_gradient_where_none_is_asked_for(monkeypatch):
    hidden, weight, target, bias = inputs(63, 97, 5)
    with torch.no_grad():
        plain = label_smoothed_cross_entropy(hidden, weight.requires_grad_(), target, 0.1, bias)
    assert not plain[0].requires_grad
    loss, nll, right = label_smoothed_cross_entropy(hidden, weight, target, 0.1, bias)
    torch.testing.assert_close(plain[:2], (loss.detach(), nll))
    assert not nll.requires_grad and right == 0
    loss.backward()
    assert weight.grad is not None and hidden.grad is None
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        label_smoothed_cross_entropy(hidden, weight, target)
    with FlopCounterMode(display=False) as both:
        label_smoothed_cross_entropy(hidden, weight, target)[0].backward()
    assert forward.get_total_flops() == 2 * 63 * 97 * 5 and both.get_total_flops() == 2 * forward.get_total_flops()


def test_target_outside_the_vocabulary_is_refused():
    hidden, weight, target, bias = inputs(3, 7, 5)
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        label_smoothed_cross_entropy(hidden, weight, target + 7, 0.1, bias)


class LargestTensor(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor):
            self.elements = max(self.elements, output.numel())
        return output


@pytest.mark.parametrize("smoothing", (0.0, 0.1))
def test_no_more_logits_than_those_of_a_chunk(smoothing):
    hidden, weight, target, _ = inputs(8 * CHUNK, 500, 4)
    with LargestTensor() as largest:
        results(fused, hidden, weight, target, None, smoothing)
    assert largest.elements == CHUNK * 500


def test_large_products_take_onednn_and_are_counted():
    hidden, weight = torch.randn(CHUNK, 64), torch.randn(LEAST // CHUNK // 64, 64)
    bias, strided = torch.randn(len(weight)), torch.randn(64, CHUNK).t()
    for x, offset in ((hidden, bias), (hidden, None), (strided, bias)):
        with FlopCounterMode(display=False) as counter:
            ours = linear(x, weight, offset)
        torch.testing.assert_close(ours, torch.nn.functional.linear(x, weight, offset), rtol=1e-4, atol=1e-4)
        assert counter.get_total_flops() == 2 * LEAST

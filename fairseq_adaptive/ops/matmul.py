"""Matrix products on the faster of torch's two libraries.

On a CPU torch multiplies float32 matrices with MKL on most builds; where :mod:`.probe` finds oneDNN as fast, products are
oneDNN's. What is neither float32 nor on a CPU, small, or under autocast, goes torch's way.
"""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from fairseq_adaptive.ops import probe

LEAST = 2**20  # multiplications; below, a call of oneDNN costs as much as it saves
_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None)

if _LINEAR is not None:

    @register_flop_formula(_LINEAR)
    def _flops(x_shape, weight_shape, *args, **kwargs):
        return 2 * torch.Size(x_shape).numel() * weight_shape[0]


def _for_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() * len(weight) >= LEAST
        and _LINEAR is not None
        and torch.backends.mkldnn.enabled
        and torch.backends.mkldnn.is_available()
        and not torch.is_autocast_enabled("cpu")
    )


def stands_for_others(x: Tensor) -> bool:
    """Whether ``x`` is traced, or stands for several tensors, so that what is measured now says nothing."""
    return (
        torch.jit.is_tracing()
        or torch.compiler.is_compiling()
        or type(x) not in (Tensor, nn.Parameter)  # FakeTensor
        or torch._C._functorch.peek_interpreter_stack() is not None  # vmap, grad
    )


def choose(x: Tensor, weight: Tensor, constant: bool = False) -> str:
    """Return whose product of float32 matrices on a CPU to take, by :mod:`.probe`; what is compiled is not measured.

    Args:
        x: ``[..., I]``
        weight: ``[O, I]``
        constant: whether W may be laid out for many products

    Returns:
        one of ``probe.KINDS``

    Raises:
        UsageError: for a wrong ``FAIRSEQ_ADAPTIVE_PRODUCTS``
    """
    # a trace has no name for an argument of oneDNN's product, functorch no rule for a batch of it
    if torch.jit.is_tracing() or torch._C._functorch.peek_interpreter_stack() is not None:
        return "torch"
    kinds, asked = probe.KINDS if constant else probe.KINDS[1:], probe.requested()
    if asked != "auto" or stands_for_others(x):
        return "torch" if asked == "torch" else kinds[0]
    rows, weights = x.numel() // max(1, x.size(-1)), weight.numel()
    return probe.figures(torch.get_num_threads()).faster(rows, weights, kinds)


def _onednn(x: Tensor, weight: Tensor, bias: Optional[Tensor] = None) -> Tensor:
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        weight = weight.contiguous()  # for rows with gaps between them oneDNN has but a loop, 100 times slower
    return _LINEAR(x, weight, bias, "none", [], "")


def linear(x: Tensor, weight: Tensor, bias: Optional[Tensor] = None) -> Tensor:
    """Return ``x weight^T + bias``, ``[..., O]``.

    Args:
        x: ``[..., I]``
        weight: ``[O, I]``
        bias: ``[O]`` or None
    """
    if not _for_onednn(x, weight) or choose(x, weight) == "torch":
        return F.linear(x, weight, bias)
    rows = x if x.dim() == 2 else x.reshape(-1, x.size(-1))
    if torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in (x, weight, bias)):
        y = _Linear.apply(rows, weight, bias)
    else:
        y = _onednn(rows, weight, bias)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], len(weight))


class _Linear(torch.autograd.Function):
    """:func:`linear` of rows ``[N, I]``, whose two products backward are oneDNN's, too."""

    @staticmethod
    def forward(x, weight, bias):
        return _onednn(x, weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        with torch.autocast("cpu", enabled=False):
            return (
                linear(grad, weight.t()) if of_x else None,
                linear(grad.t(), x.t()) if of_weight else None,
                grad.sum(0) if of_bias else None,
            )


def can_prepack(weight: Tensor) -> bool:
    """Whether oneDNN can lay out ``[O, I]``."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and _LINEAR is not None
        and torch.backends.mkldnn.enabled
        and torch.backends.mkldnn.is_available()
    )


class Prepacked:
    """:func:`linear` by oneDNN with a copy of W in its own layout; without gradients.

    Args:
        weight: ``[O, I]``, for which :func:`can_prepack` is true
        bias: ``[O]`` or None
    """

    def __init__(self, weight: Tensor, bias: Optional[Tensor] = None):
        self._packed, self._bias = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None), bias

    def __call__(self, x: Tensor) -> Tensor:
        """``[..., I]`` -> ``[..., O]``"""
        return _LINEAR(x, self._packed, self._bias, "none", [], "")


def products(x: Tensor, y: Tensor, added: Optional[Tensor] = None) -> Tensor:
    """Return ``x_n y_n^T`` for each n, ``[N, I, O]``, plus ``added``, without a gradient.

    Args:
        x: ``[N, I, D]``
        y: ``[N, O, D]``
        added: ``[N, I, O]`` or None
    """
    pairs, rows, width = x.shape
    if pairs and rows * width * y.size(1) >= LEAST and _for_onednn(x[0], y[0]) and choose(x[0], y[0]) != "torch":
        if pairs == 1:
            product = _onednn(x[0], y[0])[None]
            return product if added is None else product.add_(added)
        results = x.new_empty(pairs, rows, y.size(1))
        for number, result in enumerate(results):
            product = _onednn(x[number], y[number])
            result.copy_(product) if added is None else torch.add(product, added[number], out=result)
        return results
    y = y.transpose(1, 2)
    return torch.bmm(x, y) if added is None else torch.baddbmm(added, x, y)

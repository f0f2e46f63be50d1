"""Linear layers on a CPU: the faster products, with weights laid out once while the code sees that none can change."""

import contextlib
import copy
from contextvars import ContextVar
from typing import Callable, Dict, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq_adaptive.ops import matmul


class PrepackedWeights:
    """``x W^T + b`` for one W and many x without gradients.

    Where :mod:`fairseq_adaptive.ops.probe` finds oneDNN faster with W in its own layout, W is laid out. That costs about
    as much as two products with few rows, so it is done at the second large one. Small products, other types and
    devices take torch's way.

    W is copied, so such an object must not outlive what can change W: it lives as long as one search, or as what
    :func:`constant_weights` spans.

    Args:
        weight: O x I
        bias: O
    """

    def __init__(self, weight: Tensor, bias: Optional[Tensor] = None):
        self.weight, self.bias, self._packed, self._used = weight, bias, None, False
        self._kinds: Dict[int, str] = {}  # what was chosen, by the number of elements
        self.place = weight.data_ptr(), weight.dtype
        self._least = matmul.LEAST / weight.size(0) if matmul.can_prepack(weight) else float("inf")

    def __call__(self, x: Tensor) -> Tensor:
        """... x I -> ... x O"""
        if x.numel() < self._least or torch.is_autocast_enabled("cpu"):
            return F.linear(x, self.weight, self.bias)
        if self._kind(x) != "prepacked":
            return matmul.linear(x, self.weight, self.bias)
        if self._packed is None:
            if not self._used:
                self._used = True
                return matmul.linear(x, self.weight, self.bias)
            self._packed = matmul.Prepacked(self.weight, self.bias)
        return self._packed(x)

    def _kind(self, x):
        if matmul.stands_for_others(x):
            return matmul.choose(x, self.weight, constant=True)
        kind = self._kinds.get(x.numel())
        if kind is None:
            kind = self._kinds[x.numel()] = matmul.choose(x, self.weight, constant=True)
        return kind


# a layer's packed weights by the layer; what others make of weights by keys of their own
_KEPT: ContextVar[Optional[Dict]] = ContextVar("made of constant weights", default=None)


@contextlib.contextmanager
def constant_weights():
    """While this is open, in this thread, no weights change: :class:`PrepackedLinear` lays each out once.

    What was laid out is dropped when the outermost of several ends. A search and an evaluation open one; nothing is kept
    from one to the next, since nothing tells whether weights were written in between: ``weight._version`` does not
    change where an optimizer or an average writes through ``weight.data``.
    """
    if _KEPT.get() is not None:
        yield
        return
    token = _KEPT.set({})
    try:
        yield
    finally:
        _KEPT.reset(token)


def made_of_constants() -> Optional[Dict]:
    """What has been made of weights while none can change, by what it was made of; None where they can."""
    return _KEPT.get()


def prepacked_weights(linear: nn.Linear) -> PrepackedWeights:
    """Return the weights of a layer for many products: those laid out already where weights are constant, else new ones."""
    kept = _KEPT.get()
    if kept is None:
        return PrepackedWeights(linear.weight, linear.bias)
    found, weight = kept.get(linear), linear.weight
    if found is None or found.weight is not weight or found.place != (weight.data_ptr(), weight.dtype):  # .to(...)
        found = kept[linear] = PrepackedWeights(weight, linear.bias)
    return found


def laid_out(module: nn.Module, weights: Sequence[Tensor], rest: Tuple, make: Callable):
    """Return what ``make()`` lays out of a module's weights: where weights are constant it is made once.

    Args:
        weights: that it is made of; with others in their place, or moved, it is made again
        rest: numbers and names that it is made of
    """
    kept = _KEPT.get()
    if kept is None:
        return make()
    weights, place = tuple(weights), (rest, [(each.data_ptr(), each.dtype) for each in weights])
    found = kept.get(module)
    if (
        not isinstance(found, tuple)
        or found[1] != place
        or len(found[0]) != len(weights)
        or any(one is not other for one, other in zip(found[0], weights))
    ):
        found = kept[module] = weights, place, make()
    return found[2]


class PrepackedLinear(nn.Linear):
    """:class:`torch.nn.Linear` on the faster products: same parameters, same names, same results."""

    @classmethod
    def adopt(cls, module: nn.Module):
        """Make every plain ``nn.Linear`` in ``module`` a packed one; parameters stay where they are."""
        for each in module.modules():
            if type(each) is nn.Linear:
                each.__class__ = cls

    def __deepcopy__(self, memo):
        """A copy is an ``nn.Linear``: torch.ao.quantization, which copies a model, looks for exactly that class."""
        made = memo[id(self)] = nn.Linear.__new__(nn.Linear)
        made.__setstate__(copy.deepcopy(self.__dict__, memo))
        return made

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or _KEPT.get() is None:
            return matmul.linear(x, self.weight, self.bias)
        if x.numel() * self.out_features < matmul.LEAST:  # as packed weights do, without a look at them
            return F.linear(x, self.weight, self.bias)
        return prepacked_weights(self)(x)


LINEARS = (nn.Linear, PrepackedLinear)

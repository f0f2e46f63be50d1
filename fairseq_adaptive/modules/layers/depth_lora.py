"""What a shared layer is at each of its depths: the weights that all of them share, and a difference of the depth's own.

Bae et al., *Relaxed Recursive Transformers: Effective Parameter Sharing with Layer-wise LoRA* (ICLR 2025,
arXiv:2410.20672), section 3. A linear map at depth d is ``(W + B_d A_d) x + b + b_d`` with B_d O x r and A_d r x I, a norm has
the weight ``g + g_d`` and the bias ``h + h_d``. A starts as LoRA's does (Hu et al., 2022), all else at 0, so that a new
layer is the one without differences. The paper's differences are those of matrices; vectors cost little, and without
theirs no layer could become one of another model.

Differences of all depths of a map are one parameter: no depth that is left out leaves a parameter without a gradient.
"""

import contextlib
import math
from contextvars import ContextVar
from typing import List, Mapping, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules.layers.prepacked_linear import (
    LINEARS,
    PrepackedWeights,
    laid_out,
    made_of_constants,
    prepacked_weights,
)
from fairseq_adaptive.ops import matmul

# the parameters that are differences: A, B and vectors, one row a depth
PARTS = ("depth_a", "depth_b", "depth_weight", "depth_bias")
_DEPTH: ContextVar[int] = ContextVar("the depth that runs in this thread", default=0)


@contextlib.contextmanager
def at_depth(depth: int):
    """While this is open, in this thread, maps and norms are those of a depth."""
    token = _DEPTH.set(depth)
    try:
        yield
    finally:
        _DEPTH.reset(token)


def merged(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``W + B A`` of one depth, O x I, summed in float64."""
    return (weight.double() + b.double() @ a.double()).to(weight.dtype)


def with_difference(weights: Mapping[str, Tensor], name: str, place: int) -> Tensor:
    """The parameter of a map or norm at one of its depths; the one that all share where it has no differences.

    Args:
        weights: of a model, with the parts of this module
        name: of the parameter, ``encoder.layers.0.fc1.weight``
        place: which of the depths that the layer serves
    """
    module, _, kind = name.rpartition(".")
    a, b, more = (weights.get(f"{module}.{part}") for part in ("depth_a", "depth_b", f"depth_{kind}"))
    if kind == "weight" and a is not None:
        return merged(weights[name], a[place], b[place])
    return weights[name] if more is None else weights[name] + more[place]


def check_rank(rank: int, least: int):
    """
    Args:
        least: the least dimension of a map

    Raises:
        UsageError: for a rank that differences of such maps cannot have
    """
    if not 0 < rank <= least:
        raise UsageError(
            f"--depth-lora-rank {rank} is impossible: the smallest map of a layer has a dimension of {least}; "
            f"use 1 to {least}, or 0 for none"
        )


class _ByDepth:
    """What has a difference for each of the depths that it serves."""

    depths: Tuple[int, ...]

    def place(self, depth: Optional[int] = None) -> int:  # no property: torch.jit.trace asks every one, of all layers
        """Which of the depths that is, by default the one that runs."""
        depth = _DEPTH.get() if depth is None else depth
        if depth not in self.depths:
            served = ", ".join(map(str, self.depths))
            raise UsageError(
                f"a layer with differences for the depths {served} is asked for depth {depth}: give depth="
            )
        return self.depths.index(depth)

    def _add(self, name, *shape):
        self.register_parameter(name, nn.Parameter(self.weight.new_zeros(len(self.depths), *shape)))


class DepthLinear(_ByDepth, nn.Linear):
    """:class:`torch.nn.Linear` with low-rank differences; its own parameters keep their names."""

    @classmethod
    def adopt(cls, linear: nn.Linear, depths: Sequence[int], rank: int, generator: torch.Generator):
        """Make a linear map one with differences.

        Args:
            linear: I to O
            depths: that it serves
            rank: r, from 1 to the lesser of I and O
            generator: draws A
        """
        linear.__class__, linear.depths = cls, tuple(depths)
        linear._add("depth_a", rank, linear.in_features)
        linear._add("depth_b", linear.out_features, rank)
        bound = 1 / math.sqrt(linear.in_features)
        drawn = torch.rand(linear.depth_a.shape, generator=generator) * (2 * bound) - bound
        with torch.no_grad():
            linear.depth_a.copy_(drawn)
        if linear.bias is not None:
            linear._add("depth_bias", linear.out_features)

    def forward(self, x: Tensor) -> Tensor:
        place = self.place()
        if made_of_constants() is not None and not torch.is_grad_enabled():
            return self.prepacked(place)(x)
        low = F.linear(F.linear(x, self.depth_a[place]), self.depth_b[place])
        return matmul.linear(x, self.weight, self._bias(place)) + low

    def _bias(self, place):
        return None if self.bias is None else self.bias + self.depth_bias[place]

    def summed(self, place: int) -> Tuple[Tensor, Optional[Tensor]]:
        """Weight and bias at one of its depths."""
        return merged(self.weight, self.depth_a[place], self.depth_b[place]), self._bias(place)

    def prepacked(self, place: int) -> PrepackedWeights:
        """One product, whose matrix is made once while weights are constant, as in a search."""
        parts = [each for each in self._parameters.values() if each is not None]
        return laid_out((self, place), parts, (), lambda: PrepackedWeights(*self.summed(place)))


class DepthNorm(_ByDepth, nn.LayerNorm):
    """:class:`torch.nn.LayerNorm` with differences."""

    @classmethod
    def adopt(cls, norm: nn.LayerNorm, depths: Sequence[int]):
        """Make a norm one with differences, see :meth:`DepthLinear.adopt`."""
        norm.__class__, norm.depths = cls, tuple(depths)
        norm._add("depth_weight", *norm.weight.shape)
        norm._add("depth_bias", *norm.bias.shape)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, *self.summed(self.place()), self.eps)

    def summed(self, place: int) -> Tuple[Tensor, Tensor]:
        """Weight and bias at one of its depths."""
        return self.weight + self.depth_weight[place], self.bias + self.depth_bias[place]


DEPTH_MODULES = (DepthLinear, DepthNorm)


def weight_and_bias(module: nn.Module, depth: int) -> Tuple[Optional[Tensor], Optional[Tensor]]:
    """What a map or norm computes with at a depth, without gradients: its own, or the sums with the depth's differences."""
    if isinstance(module, DEPTH_MODULES):
        with torch.no_grad():
            return module.summed(module.place(depth))
    return module.weight, module.bias


def prepacked_at(linear: nn.Linear, depth: int) -> PrepackedWeights:
    """:func:`~fairseq_adaptive.modules.layers.prepacked_linear.prepacked_weights` of a map at a depth."""
    return linear.prepacked(linear.place(depth)) if isinstance(linear, DepthLinear) else prepacked_weights(linear)


def layers_to_lay_out(stack) -> Tuple[List[Tuple[nn.Module, int]], List[int]]:
    """What has to be laid out to run a stack from weights: one layer for all depths at which it is the same, one for each
    depth at which it differs.

    Args:
        stack: a :class:`~fairseq_adaptive.modules.LayerStack`

    Returns:
        pairs of a layer and a depth that it serves, and for each depth the number of its pair
    """
    found, schedule = {}, []
    for depth, number in enumerate(stack.schedule):
        layer = stack.layer(number)
        key = number, depth if layer.lora_rank else -1
        found.setdefault(key, (len(found), layer, depth))
        schedule.append(found[key][0])
    return [(layer, depth) for _, layer, depth in found.values()], schedule


def add_depth_lora(layers: Sequence[nn.Module], schedule: Sequence[int], rank: int):
    """Give all linear maps and norms of layers differences for the depths that each layer serves. A layer that serves one
    depth has none.

    A is drawn by a generator of its own: what is initialised later is as in a model without.

    Args:
        layers: the M layers; each gets ``lora_rank``
        schedule: for each depth the number of its layer
        rank: r of all maps; 0: nothing is done

    Raises:
        UsageError: when the rank is above the least dimension of a map
    """
    if not rank:
        return
    from fairseq_adaptive.modules.layers.residual import FUSABLE  # with fairseq, which plain stacks do without

    generator = torch.Generator().manual_seed((torch.initial_seed() + 0x10A4) % (1 << 63))
    for number, layer in enumerate(layers):
        depths = [depth for depth, served_by in enumerate(schedule) if served_by == number]
        if len(depths) < 2:
            continue
        maps = [each for each in layer.modules() if type(each) in LINEARS]
        check_rank(rank, min(min(each.weight.shape) for each in maps))
        for each in maps:
            DepthLinear.adopt(each, depths, rank, generator)
        for each in layer.modules():
            if isinstance(each, FUSABLE) and each.weight is not None:
                DepthNorm.adopt(each, depths)
        layer.lora_rank = rank

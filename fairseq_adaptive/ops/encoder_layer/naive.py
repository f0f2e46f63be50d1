"""The definition of a layer of an encoder over sentences that lie one after the other, and of the scores of a predictor."""

from typing import List, NamedTuple, Optional

import torch.nn.functional as F
from torch import Tensor

from fairseq_adaptive.ops.decoder_step.naive import Map, Norm, Stack, encode
from fairseq_adaptive.ops.int8_linear.naive import int8_linear


class Int8Map(NamedTuple):
    """A :class:`Map` whose product is one of int8: O x I, and O or None."""

    weight: Tensor
    bias: Optional[Tensor]

    def __call__(self, x):
        return int8_linear(x, self.weight, self.bias).to(x.dtype)


def encoder_layer(stack: Stack, x: Tensor, lengths: List[int], depth: int = 0) -> Tensor:
    """P x C -> P x C, the layer of one depth of a stack, whose maps are all :class:`Map` or all :class:`Int8Map`."""
    omega = None if stack.omega is None else stack.omega[depth : depth + 1]
    return encode(stack._replace(schedule=stack.schedule[depth : depth + 1], omega=omega, last=None), x, lengths)


class Predictor(NamedTuple):
    """LayerNorm, a map C -> C, LayerNorm, GELU and a map C -> 2.

    Attributes:
        map: a :class:`Map` or an :class:`Int8Map`
    """

    first: Norm
    map: Map
    second: Norm
    score: Map

    def __call__(self, x: Tensor) -> Tensor:
        """R x C -> R x 2"""
        return self.score(F.gelu(self.second(self.map(self.first(x)))))

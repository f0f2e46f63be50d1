"""The definition of a layer of an encoder over sentences that lie one after the other, and of the scores of a predictor."""

from typing import List, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from fairseq_adaptive.ops.decoder_step.naive import Map, Norm, Stack, encode


def encoder_layer(stack: Stack, x: Tensor, lengths: List[int], depth: int = 0) -> Tensor:
    """P x C -> P x C, the layer of one depth of a stack."""
    omega = None if stack.omega is None else stack.omega[depth : depth + 1]
    return encode(stack._replace(schedule=stack.schedule[depth : depth + 1], omega=omega, last=None), x, lengths)


class Predictor(NamedTuple):
    """LayerNorm, a map C -> C, LayerNorm, GELU and a map C -> 2.

    Attributes:
        map: or an :class:`~fairseq_adaptive.ops.decoder_step.Int8Map`
    """

    first: Norm
    map: Map
    second: Norm
    score: Map

    def __call__(self, x: Tensor) -> Tensor:
        """R x C -> R x 2"""
        return self.score(F.gelu(self.second(self.map(self.first(x)))))

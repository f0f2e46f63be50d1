"""Dropout that does not wait for random numbers on a CPU."""

import torch
from fairseq.modules import FairseqDropout
from torch import Tensor, nn

from fairseq_adaptive.ops.dropout_mask import dropout_mask, keeps_some


class FastDropout(FairseqDropout):
    """:class:`fairseq.modules.FairseqDropout` in a fifth of its time on a CPU, where it draws 16 bits for an element.

    The probability is rounded to a multiple of 1 / 65,536 and the expectation kept, up to
    the rounding of the scale. Random numbers are others
    than fairseq's for the same seed.
    """

    def forward(self, x: Tensor, inplace: bool = False) -> Tensor:
        """Any shape to the same shape; ``inplace`` is allowed, not done."""
        active = self.training or self.apply_during_inference
        if x.device.type != "cpu" or not active or not keeps_some(self.p) or torch.jit.is_scripting():
            return super().forward(x, inplace)
        return x * dropout_mask(x.shape, self.p, x.dtype)


def quicken_dropout(model: nn.Module) -> None:
    """Make every dropout that fairseq has built into a model a :class:`FastDropout`."""
    for module in model.modules():
        if type(module) is FairseqDropout:
            module.__class__ = FastDropout

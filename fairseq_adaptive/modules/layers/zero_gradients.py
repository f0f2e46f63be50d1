"""Parameters that a training step leaves out."""

import torch
from torch import Tensor, nn


class _TakePart(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *parameters):
        ctx.parameters = parameters
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, *(torch.zeros_like(parameter) for parameter in ctx.parameters)


def zero_gradients(x: Tensor, *modules: nn.Module) -> Tensor:
    """Return x; where its gradient is computed, the parameters of the modules, which it does not depend on, get zeros.

    DistributedDataParallel waits for a gradient of every parameter, and an optimizer that skips those without would do
    other things on one worker than on several.
    """
    return _TakePart.apply(x, *(parameter for module in modules for parameter in module.parameters()))

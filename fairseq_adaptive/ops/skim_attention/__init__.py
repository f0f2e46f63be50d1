"""Self-attention of packed sequences in which some tokens are skimmed, with a gradient for who is."""

from typing import Optional

import torch
from torch import Tensor

from fairseq_adaptive.ops.registry import Op
from fairseq_adaptive.ops.skim_attention.sequences import Sequences

__all__ = ["OP", "Sequences", "skim_attention"]
OP = Op("skim_attention", {"triton": f"{__name__}.triton", "torch": f"{__name__}.eager"})


def skim_attention(
    query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, kept: Optional[Tensor] = None, dropout: float = 0.0
) -> Tensor:
    """Return ``[R, H, D]`` as ``naive.py`` defines it.

    Softmax, its sums and the gradient of ``kept`` are in at least float32. The backward pass computes the weights again
    and draws the same dropout.

    Args:
        query, key, value: ``[R, H, D]``, all of one dtype
        sequences: which rows are a sequence
        kept: ``[R]``, 1 where a row is kept and 0 where it is skimmed; None: all are kept
        dropout: probability of leaving out a weight
    """
    seed = int(torch.randint(2**31, (), device="cpu")) if dropout else 0
    with torch.autocast(query.device.type, enabled=False):
        return _SkimAttention.apply(query, key, value, kept, sequences, dropout, seed, torch.is_grad_enabled())


class _SkimAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, kept, sequences, dropout, seed, gradient):
        ctx.backend, ctx.settings = OP.implementation(query, query.dtype), (sequences, dropout, seed)
        gradient &= any(ctx.needs_input_grad)
        out, highest, total = ctx.backend.forward(query, key, value, sequences, kept, dropout, seed, gradient)
        ctx.save_for_backward(query, key, value, kept, out, highest, total)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        query, key, value, kept, *saved = ctx.saved_tensors
        sequences, dropout, seed = ctx.settings
        with torch.autocast(query.device.type, enabled=False):
            grads = ctx.backend.backward(grad, query, key, value, sequences, kept, dropout, seed, *saved)
        return *grads, None, None, None, None

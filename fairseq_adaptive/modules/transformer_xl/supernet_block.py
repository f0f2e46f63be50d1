"""A block whose kind is searched: attention, feed-forward or identity.

Mandava et al., *Pay Attention when Required* (2020), Section 3: a supernet of such blocks, each a Gumbel-softmax mixture
(Jang et al., 2017) of the three. That one path is run a step is Dong and Yang, *GDAS* (2019), Section 3.2.
"""

from typing import Optional, Union

import torch
from torch import nn

from fairseq_adaptive.modules.layers.known import known
from fairseq_adaptive.modules.layers.zero_gradients import zero_gradients
from fairseq_adaptive.modules.transformer_xl.blocks import AttentionBlock, FeedForwardBlock
from fairseq_adaptive.modules.transformer_xl.relative_attention import KeyValueCache, RelativePositions

KINDS = "afi"  # attention, feed-forward, identity: the columns of the architecture parameters


def mixture_weights(logits: torch.Tensor, temperature: float, noise: bool) -> torch.Tensor:
    """Gumbel-softmax of the architecture parameters.

    The noise is drawn on the CPU, before anything else of a forward: workers, which have the same seed at each update,
    draw the same architecture.

    Args:
        logits: ``[N, 3]``, the columns as in ``KINDS``
        temperature: above 0; the smaller, the nearer to one kind a block
        noise: add Gumbel noise: in training, not in evaluation

    Returns:
        ``[N, 3]`` in float32, each row of sum 1
    """
    logits = logits.float()
    if noise:
        uniform = torch.rand(logits.shape).clamp_(min=torch.finfo(torch.float32).tiny)
        logits = logits - torch.log(-torch.log(uniform)).to(logits.device)
    return torch.softmax(logits / temperature, dim=-1)


@known
class StochasticBlock(nn.Module):
    """Attention, feed-forward and identity, mixed or one of them."""

    kind, step_kind = "a", "mixture"  # it has a memory, as attention blocks have

    def __init__(self, attention: AttentionBlock, feed_forward: FeedForwardBlock):
        super().__init__()
        self.attention = attention
        self.feed_forward = feed_forward
        self.embed_dim = attention.embed_dim

    def macs(self, work):
        """Multiply-adds, B, of a :class:`~fairseq_adaptive.modules.stack.compute.Work`: of one kind or of all."""
        parts = [part for kind, part in (("a", self.attention), ("f", self.feed_forward)) if work.path in (None, kind)]
        return sum((part.macs(work) for part in parts), work.computed * 0)

    @property
    def attends(self):
        return self.attention

    def forward(
        self,
        x: torch.Tensor,
        positions: Optional[RelativePositions] = None,
        memory: Optional[Union[torch.Tensor, KeyValueCache]] = None,
        window: Optional[int] = None,
        *,
        weights: torch.Tensor,
        path: Optional[int],
        self_attention=None,
        depth: int = 0,
        residual=None,
    ) -> torch.Tensor:
        """
        Args:
            x: ``[B, T, C]``
            weights: ``[3]``, of :func:`mixture_weights`
            path: the column of ``KINDS`` that is run alone; None: all three, mixed by ``weights``
            positions, memory, window: of :class:`~fairseq_adaptive.modules.transformer_xl.blocks.AttentionBlock`

        Returns:
            ``[B, T, C]``; of a single path the value is that of its block, and the gradient of its weight is that which
            the mixture would give it
        """
        weights = weights.to(x.dtype)
        if path is None:
            attended = self.attention(x, positions, memory, window, self_attention)
            return weights[0] * attended + weights[1] * self.feed_forward(x) + weights[2] * x
        idle = [part for kind, part in (("a", self.attention), ("f", self.feed_forward)) if kind != KINDS[path]]
        if KINDS[path] == "a":
            x = self.attention(x, positions, memory, window, self_attention)
        elif KINDS[path] == "f":
            x = self.feed_forward(x)
        if not weights.requires_grad:
            return x
        return zero_gradients(x, *idle) * (1 + weights[path] - weights[path].detach())

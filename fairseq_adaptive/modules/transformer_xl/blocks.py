"""The blocks of a Transformer-XL, taken apart: attention or feed-forward, each with its residual and LayerNorm.

Dai et al., *Transformer-XL* (2019), Section 3.3; that a block is a unit of its own is Mandava et al., *Pay Attention when
Required* (2020).
"""

from typing import Callable, Optional, Union

import torch
import torch.nn.functional as F
from fairseq.modules import FairseqDropout, LayerNorm
from torch import nn

from fairseq_adaptive.modules.layers.known import known
from fairseq_adaptive.modules.layers.prepacked_linear import PrepackedLinear
from fairseq_adaptive.modules.layers.residual import add_and_norm
from fairseq_adaptive.modules.transformer_xl.relative_attention import (
    KeyValueCache,
    RelativeAttention,
    RelativePositions,
)


class ResidualBlock(nn.Module):
    """``LayerNorm(x + branch(x))``, or ``x + branch(LayerNorm(x))`` with ``normalize_before``."""

    def __init__(self, embed_dim: int, dropout: float = 0.0, normalize_before: bool = False):
        super().__init__()
        self.dropout_module = FairseqDropout(dropout, module_name=self.__class__.__name__)
        self.embed_dim, self.normalize_before = embed_dim, normalize_before
        self.layer_norm = LayerNorm(embed_dim)

    def before(self, x):
        return self.layer_norm(x) if self.normalize_before else x

    def after(self, x, branch):
        return add_and_norm(x, branch, self.dropout_module, None if self.normalize_before else self.layer_norm)[1]


@known
class AttentionBlock(ResidualBlock):
    """Attention over the positions so far and over the memory."""

    kind, step_kind = "a", "attention"

    def __init__(self, attention: RelativeAttention, embed_dim, dropout=0.0, normalize_before=False):
        super().__init__(embed_dim, dropout, normalize_before)
        self.attention = attention

    def forward(
        self,
        x: torch.Tensor,
        positions: Optional[RelativePositions] = None,
        memory: Optional[Union[torch.Tensor, KeyValueCache]] = None,
        window: Optional[int] = None,
        self_attention: Optional[Callable] = None,
        depth: int = 0,
        residual=None,
    ) -> torch.Tensor:
        """
        Args:
            x: ``[B, T, C]``, or ``[P, C]`` with ``self_attention``
            self_attention: what a stack gives in place of the three below: from what attention reads to what it adds
            positions: the encodings of distances
            memory: inputs of this block at the M positions before, ``[B, M, C]``, or their keys and values
            window: how many keys each position sees, itself among them (None: all)

        Returns:
            ``[B, T, C]``
        """
        read = self.before(x)
        return self.after(
            x, self.attend(read, positions, memory, window) if self_attention is None else self_attention(read)
        )

    def macs(self, work):
        """Multiply-adds, B, of a :class:`~fairseq_adaptive.modules.stack.compute.Work`."""
        dim, inner = self.embed_dim, self.attention.num_heads * self.attention.head_dim
        keys = work.read + work.memory
        if work.window is not None:
            keys = torch.minimum(keys, work.read + work.window - 1)
        linear = 2 * work.computed + 2 * (work.made + work.memory_made)
        cached = work.memory > work.memory_made  # which keeps the projected positions, too
        projects = work.projects and not cached and work.computed.any()
        positions = dim * inner * (keys.max() + 1) / len(keys) if projects else 0  # once a batch
        return dim * inner * linear + positions + work.computed * (3 * keys + 1) * inner

    @property
    def attends(self):
        """The block that has a memory: itself, one within it, or None."""
        return self

    def keys_and_values(self, read):
        """Those of what attention reads, ``[..., C]``, ``[..., H D]`` each."""
        return self.attention.keys_and_values(read).chunk(2, -1)

    def attend(self, x, positions, memory, window):
        """The branch, of what :meth:`before` made of the input; the memory is what the block's inputs were."""
        cache = memory if isinstance(memory, KeyValueCache) else None
        hidden = None if memory is None or cache is not None else self.before(memory)
        return self.attention(x, positions, memory=hidden, cache=cache, window=window)


@known
class FeedForwardBlock(ResidualBlock):
    """Two linear maps with a ReLU between them, position by position."""

    kind, step_kind, attends = "f", "feed-forward", None

    def __init__(self, embed_dim, ffn_dim, dropout=0.0, activation_dropout=0.0, normalize_before=False):
        super().__init__(embed_dim, dropout, normalize_before)
        self.activation_dropout_module = FairseqDropout(activation_dropout, module_name=self.__class__.__name__)
        self.fc1 = PrepackedLinear(embed_dim, ffn_dim)
        self.fc2 = PrepackedLinear(ffn_dim, embed_dim)

    def macs(self, work):
        """Multiply-adds, B, of a :class:`~fairseq_adaptive.modules.stack.compute.Work`."""
        return 2 * self.embed_dim * self.fc1.out_features * work.computed

    def forward(self, x: torch.Tensor, self_attention=None, depth: int = 0, residual=None) -> torch.Tensor:
        """``[..., C]`` to ``[..., C]``; what a stack says besides is for attention."""
        return self.after(x, self.fc2(self.activation_dropout_module(F.relu(self.fc1(self.before(x))))))

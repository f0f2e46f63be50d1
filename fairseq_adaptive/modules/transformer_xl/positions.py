"""Relative positions of a Transformer-XL: encodings of distances, and what layers make of them."""

from typing import Callable, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules.layers.prepacked_linear import made_of_constants


class RelativePositions(nn.Module):
    """Sinusoids of distances, the R of Transformer-XL: all sines, then all cosines. It has no parameters.

    Args:
        embed_dim: C, even
        clamp_length: larger distances are encoded as this one; 0: none is
        dropout: on the encodings

    Raises:
        UsageError: when ``embed_dim`` is odd
    """

    def __init__(self, embed_dim: int, clamp_length: int = 0, dropout: float = 0.0):
        super().__init__()
        if embed_dim % 2:
            raise UsageError(f"relative positions need an even embedding dimension, not {embed_dim}")
        self.embed_dim = embed_dim
        self.clamp_length = clamp_length
        self.dropout = dropout
        self._table: Optional[Tensor] = None

    def forward(self, length: int, like: Tensor) -> Tensor:
        """Encode the distances ``length - 1`` to 0, in this order: ``[length, C]``, dtype and device of ``like``."""
        table = self._table
        if table is None or len(table) < length or table.dtype != like.dtype or table.device != like.device:
            table = self._table = self._encode(length, like)
        return F.dropout(table[len(table) - length :], self.dropout, self.training)

    # a table made within inference_mode could not be used in training afterwards
    @torch.inference_mode(False)
    @torch.no_grad()
    def _encode(self, length: int, like: Tensor) -> Tensor:
        exact = torch.promote_types(like.dtype, torch.float32)
        distances = torch.arange(length - 1, -1, -1, device=like.device, dtype=exact)
        if self.clamp_length > 0:
            distances.clamp_(max=self.clamp_length)
        # rounded to fp32 even for a model in float64, as published weights were trained
        frequencies = 1 / 10000 ** (torch.arange(0.0, self.embed_dim, 2.0, dtype=torch.float32) / self.embed_dim)
        angles = distances[:, None] * frequencies.to(distances)
        return torch.cat((angles.sin(), angles.cos()), -1).to(like.dtype)


class ProjectedPositions:
    """What one layer's projection makes of the encodings, made once for the longest distance so far.

    For fixed weights, as :class:`~fairseq_adaptive.modules.transformer_xl.cache.KeyValueCache`.
    """

    def __init__(self):
        self._made: Optional[Tensor] = None

    def __call__(self, length: int, project: Callable[[int], Tensor], more: int = 0) -> Tensor:
        """Those of distances ``length - 1`` to 0, ``[H, length, D]``.

        Args:
            project: makes those of n distances, ``[H, n, D]``
            more: how many distances are made beside those that are asked for, where some must be made
        """
        if self._made is None or self._made.size(1) < length:
            self._made = project(length + more)
        return self._made[:, self._made.size(1) - length :]

    @classmethod
    def of(cls, attention: nn.Module, encodings: RelativePositions) -> "ProjectedPositions":
        """Those of a layer for one call, or while weights are constant, see
        :func:`~fairseq_adaptive.modules.layers.prepacked_linear.constant_weights`."""
        kept = None if encodings.training or torch.is_grad_enabled() else made_of_constants()
        if kept is None:
            return cls()
        weight = attention.position_proj.weight
        setting = weight.data_ptr(), weight.dtype, encodings.clamp_length, torch.is_autocast_enabled(weight.device.type)
        return kept.setdefault((attention, encodings, *setting), cls())


class LayerPositions:
    """What one layer is given in one call: the encodings, and a place for what it projects, whatever depths it serves."""

    def __init__(self, encodings: RelativePositions, projected: ProjectedPositions):
        self._encodings, self.projected = encodings, projected

    def __call__(self, length: int, like: Tensor) -> Tensor:
        return self._encodings(length, like)

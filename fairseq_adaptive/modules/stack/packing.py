"""Padded <-> packed tokens."""

from typing import Optional

import torch
from torch import Tensor

from fairseq_adaptive.ops.skim_attention import Sequences


def token_mask(x: Tensor, padding_mask: Optional[Tensor]) -> Tensor:
    """B x T, true at tokens; x is T x B x C and padding_mask B x T, true at padding, or None."""
    if padding_mask is None:
        return torch.ones((x.size(1), x.size(0)), dtype=torch.bool, device=x.device)
    return ~padding_mask.bool()


class PackedTokens:
    """The tokens of B x T places, packed.

    Args:
        tokens: B x T, false at padding
    """

    def __init__(self, tokens: Tensor):
        self.tokens, self.places = tokens, None if tokens.all() else tokens.flatten().nonzero().squeeze(1)

    def take(self, x: Tensor) -> Tensor:
        """B x T x ... -> P x ..."""
        x = x.flatten(0, 1)
        return x if self.places is None else x.index_select(0, self.places)

    def put(self, rows: Tensor, x: Optional[Tensor] = None) -> Tensor:
        """P x ... -> B x T x ..., undoes :meth:`take`; padding is that of ``x``, or zero."""
        if self.places is not None:
            x = rows.new_zeros((self.tokens.numel(), *rows.shape[1:])) if x is None else x.flatten(0, 1)
            rows = x.index_copy(0, self.places, rows)
        return rows.unflatten(0, self.tokens.shape)

    def sequences(self) -> Sequences:
        """These rows by the sequence that they belong to."""
        return Sequences(self.tokens.sum(1))


class Groups:
    """Packed rows by the sequence that they belong to, so that attention is one call for all of them.

    Args:
        sequence: R, the number of the sequence of each row, ascending
        count: B, how many sequences there are
    """

    def __init__(self, sequence: Tensor, count: int):
        self._active, self._cell = None, None
        if count == 1:  # whose rows need no counting
            self._shape = (1, sequence.numel())
            return
        active, group, sizes = torch.unique_consecutive(sequence, return_inverse=True, return_counts=True)
        if active.numel() < count:
            self._active = active
        self._shape = (active.numel(), int(sizes.max()))
        place = torch.arange(sequence.numel(), device=sequence.device) - (sizes.cumsum(0) - sizes)[group]
        if sequence.numel() < self._shape[0] * self._shape[1]:
            self._cell = group * self._shape[1] + place

    def pad(self, rows: Tensor) -> Tensor:
        """P x ... -> G x Q x ...: G sequences have rows, Q the one that has the most; zeros behind the others'."""
        if self._cell is None:
            return rows.unflatten(0, self._shape)
        x = rows.new_zeros((self._shape[0] * self._shape[1], *rows.shape[1:]))
        return x.index_copy_(0, self._cell, rows).unflatten(0, self._shape)

    def unpad(self, x: Tensor) -> Tensor:
        """G x Q x ... -> P x ..., undoes :meth:`pad`."""
        x = x.flatten(0, 1)
        return x if self._cell is None else x.index_select(0, self._cell)

    def select(self, x: Tensor, dim: int = 0) -> Tensor:
        """B x ... -> G x ..., what belongs to the sequences that have rows; B may be at another ``dim``."""
        return x if self._active is None else x.index_select(dim, self._active)

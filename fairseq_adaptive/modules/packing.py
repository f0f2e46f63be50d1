"""Padded <-> packed tokens."""

from typing import Optional

import torch
from torch import Tensor


def token_mask(x: Tensor, padding_mask: Optional[Tensor]) -> Tensor:
    """B x T, true at tokens; x is T x B x C and padding_mask B x T, true at padding, or None."""
    if padding_mask is None:
        return torch.ones((x.size(1), x.size(0)), dtype=torch.bool, device=x.device)
    return ~padding_mask.bool()


class Groups:
    """Packed rows by the sequence that they belong to, so that attention is one call for all of them.

    Args:
        sequence: R, the number of the sequence of each row, ascending
        count: B, how many sequences there are
    """

    def __init__(self, sequence: Tensor, count: int):
        active, group, sizes = torch.unique_consecutive(sequence, return_inverse=True, return_counts=True)
        self._active = None if active.numel() == count else active
        self._shape = (active.numel(), int(sizes.max()))
        place = torch.arange(sequence.numel(), device=sequence.device) - (sizes.cumsum(0) - sizes)[group]
        full = sequence.numel() == self._shape[0] * self._shape[1]
        self._cell = None if full else group * self._shape[1] + place

    def pad(self, rows: Tensor) -> Tensor:
        """R x ... -> G x Q x ...: G sequences have rows, Q the one that has the most; zeros behind the others'."""
        if self._cell is None:
            return rows.unflatten(0, self._shape)
        x = rows.new_zeros((self._shape[0] * self._shape[1], *rows.shape[1:]))
        return x.index_copy_(0, self._cell, rows).unflatten(0, self._shape)

    def unpad(self, x: Tensor) -> Tensor:
        """G x Q x ... -> R x ..., undoes :meth:`pad`."""
        x = x.flatten(0, 1)
        return x if self._cell is None else x.index_select(0, self._cell)

    def select(self, x: Tensor) -> Tensor:
        """B x ... -> G x ..., what belongs to the sequences that have rows."""
        return x if self._active is None else x.index_select(0, self._active)

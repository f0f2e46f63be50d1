"""Padded <-> packed tokens."""

import torch
from torch import Tensor


def pack(x: Tensor, mask: Tensor) -> Tensor:
    """Return the rows of ``x`` (B x T x ...) where ``mask`` (B x T) is true, in order: R x ...."""
    return x.flatten(0, 1).index_select(0, mask.flatten().nonzero().squeeze(1))


def unpack(rows: Tensor, mask: Tensor, fill=0) -> Tensor:
    """Undo :func:`pack`: B x T x ... with ``rows`` (R x ...) where ``mask`` (B x T) is true and ``fill`` elsewhere."""
    x = rows.new_full((mask.numel(), *rows.shape[1:]), fill)
    return x.index_copy_(0, mask.flatten().nonzero().squeeze(1), rows).unflatten(0, mask.shape)


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

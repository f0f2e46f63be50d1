"""Packed sequences in pieces: what is computed at a time, so that it fits the cache and little of it is padding."""

import functools
from typing import Dict, List, NamedTuple, Optional

import torch
from torch import Tensor

LARGEST = 2**20  # scores of a piece, all heads together; a single head of a sequence may have more
WASTED = 2**16  # scores of padding in a piece: they cost less than the calls of another piece


class Piece(NamedTuple):
    """Sequences that are computed together, the longest of T rows.

    Attributes:
        count: G, how many they are
        length: T
        first: the first row, of a single sequence
        places: ``[G T]``, of several sequences: the row of each place, any where there is none
        filled: ``[F]``, the places that have a row, or None: all
    """

    count: int
    length: int
    first: int = 0
    places: Optional[Tensor] = None
    filled: Optional[Tensor] = None

    def take(self, rows: Tensor) -> Tensor:
        """``[R, ...]`` to ``[G, T, ...]``, anything where there is no row."""
        if self.places is None:
            return rows[self.first : self.first + self.length].unsqueeze(0)
        return rows.index_select(0, self.places).unflatten(0, (self.count, self.length))

    def put(self, x: Tensor, rows: Tensor) -> None:
        """``[G, T, ...]`` to its places in ``[R, ...]``, in place."""
        if self.places is None:
            rows[self.first : self.first + self.length] = x[0]
        elif self.filled is None:
            rows.index_copy_(0, self.places, x.flatten(0, 1).to(rows.dtype))
        else:
            rows.index_copy_(0, self.places[self.filled], x.flatten(0, 1).index_select(0, self.filled).to(rows.dtype))

    def padding(self) -> Optional[Tensor]:
        """``[G, T]``, true where there is no row; None where there always is."""
        if self.filled is None:
            return None
        padding = self.places.new_ones(self.count * self.length, dtype=torch.bool)
        return padding.index_fill_(0, self.filled, False).view(self.count, self.length)


class Sequences:
    """Packed rows by the sequence that they belong to.

    Args:
        lengths: ``[B]``, how many rows each has, R in all; 0 is allowed
    """

    def __init__(self, lengths: Tensor):
        self.counts, self.offsets = lengths, torch.nn.functional.pad(lengths.cumsum(0), (1, 0))  # [B], [B + 1]
        self._pieces: Dict[int, List[Piece]] = {}  # a cache of the method would keep every batch for good

    @functools.cached_property
    def lengths(self) -> List[int]:
        return self.counts.tolist()

    @property
    def longest(self) -> int:
        return max(self.lengths, default=0)

    def pieces(self, heads: int) -> List[Piece]:
        """Sequences of about the same length together, those of many scores alone."""
        if heads not in self._pieces:
            self._pieces[heads] = self._make_pieces(heads)
        return self._pieces[heads]

    def _make_pieces(self, heads):
        starts, pieces, together, wasted = self.offsets.tolist(), [], [], 0
        for sequence in sorted(range(len(self.lengths)), key=self.lengths.__getitem__, reverse=True):
            length = self.lengths[sequence]
            longest = self.lengths[together[0]] if together else length
            waste = heads * (longest**2 - length**2)
            if together and (
                wasted + waste > WASTED or heads * (len(together) + 1) * longest**2 > LARGEST or not length
            ):
                pieces.append(self._piece(together, starts))
                together, wasted, waste = [], 0, 0
            if not length:
                break
            together.append(sequence)
            wasted += waste
        if together:
            pieces.append(self._piece(together, starts))
        return pieces

    def _piece(self, sequences, starts):
        longest = self.lengths[sequences[0]]
        if len(sequences) == 1:
            return Piece(1, longest, starts[sequences[0]])
        first = torch.tensor([starts[sequence] for sequence in sequences])[:, None]
        last = first + torch.tensor([self.lengths[sequence] for sequence in sequences])[:, None] - 1
        places = first + torch.arange(longest)
        filled = None if self.lengths[sequences[-1]] == longest else (places <= last).flatten().nonzero().squeeze(1)
        return Piece(len(sequences), longest, 0, places.minimum(last).flatten(), filled)

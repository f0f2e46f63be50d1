"""Which token stands for which, after a router has merged some."""

from typing import Optional

import torch
from torch import Tensor


class Merges:
    """Of every token of a run the one that stands for it; it does not change, what changes it returns another.

    Args:
        tokens: B x T, true at tokens
        place: what :attr:`place` begins with (default: each token stands for itself)

    Attributes:
        place: B x T, where in its sequence the one that stands for each token is
        numbers: B x T, the number of each place of the batch
    """

    def __init__(self, tokens: Tensor, place: Optional[Tensor] = None):
        batch, length = tokens.shape
        self.numbers = torch.arange(tokens.numel(), device=tokens.device).view(batch, length)
        self.place = self.numbers % length if place is None else place

    def add(self, numbers: Tensor, into: Tensor) -> "Merges":
        """More are merged.

        Args:
            numbers: P, of the places of some tokens
            into: P, of each of them which of these stands for it from now on
        """
        length, stands = self.place.size(1), self.numbers.flatten().clone()
        stands[numbers] = numbers.index_select(0, into)
        stands = (stands % length).view_as(self.place)
        return Merges(self.numbers, stands.gather(1, self.place))

    def extend(self, count: int) -> "Merges":
        """Tokens join, ``count`` places behind the others."""
        batch, length = self.place.shape
        new = torch.arange(length, length + count, device=self.place.device).expand(batch, -1)
        place = torch.cat((self.place, new), 1)
        return Merges(place, place)

    def spread(self, x: Tensor) -> Tensor:
        """T x B x C, to every token the state of the one that stands for it."""
        return x.gather(0, self.place.t().unsqueeze(-1).expand_as(x))

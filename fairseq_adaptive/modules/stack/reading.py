"""Reading in a run: a reader with what there is to read, and how its tokens join."""

from typing import NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules.policies.base import Reader
from fairseq_adaptive.modules.stack.packing import token_mask


class Reading(NamedTuple):
    """A reader, with what there is to read in this call."""

    reader: Reader
    bank: Optional[Tensor] = None
    bank_padding_mask: Optional[Tensor] = None

    def __call__(self, x: Tensor, padding_mask: Optional[Tensor]):
        """T x B x C and B x T -> what was read."""
        padding_mask = ~token_mask(x, padding_mask)
        rest = () if self.bank is None else (self.bank, self.bank_padding_mask)
        return self.reader.read(x, padding_mask, *rest)


def check_reader(stack, reader: Optional[Reader]) -> None:
    """Refuse a reader that never reads in a stack, or whose tokens would lack keys.

    Raises:
        UsageError: with what would be right
    """
    if reader is None:
        return
    if not 0 <= reader.depth < len(stack):
        raise UsageError(f"a reader at depth {reader.depth} never reads: use 0 to {len(stack) - 1}")
    if reader.depth and stack.kv != "recompute":
        flag = "--halting-kv" if stack.kv == stack.halting_kv else "--router-kv"
        raise UsageError(
            f"{flag} {stack.kv} cannot be combined with a reader that reads after the first layer, "
            "whose tokens have no keys of it: choose recompute or active, or let it read at depth 0"
        )


def joined(reading: Reading, x: Tensor, padding_mask: Optional[Tensor], protected: Optional[Tensor]) -> Tuple:
    """What a reader reads before the first depth, behind the rest."""
    read = reading(x, padding_mask)
    if padding_mask is None:
        padding_mask = torch.zeros_like(read.live[:, :1]).expand(-1, x.size(0))
    if protected is not None:
        protected = torch.cat((protected, torch.zeros_like(read.live)), 1)
    mask = torch.cat((padding_mask.bool(), ~read.live), 1)
    return torch.cat((x, read.appended.transpose(0, 1))), mask, protected, read

"""The definition of an update of adaptive computation time after a depth (Graves, 2016)."""

from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor


class Update(NamedTuple):
    """What a depth leaves behind.

    Attributes:
        state: ... x C, in the precision of the state before
        output: ... x C, or None where none was given
        halting, remainders: ..., as the next depth takes them
        running: ..., true where the token goes on
        probability: ..., what the halting unit said, 0 at tokens that were not running
    """

    state: Tensor
    output: Optional[Tensor]
    halting: Tensor
    remainders: Tensor
    running: Tensor
    probability: Tensor


def halting_update(
    before: Tensor,
    after: Tensor,
    weight: Tensor,
    bias: Tensor,
    halting: Tensor,
    remainders: Tensor,
    running: Tensor,
    threshold: float,
    output: Optional[Tensor] = None,
) -> Update:
    """Update sums, states and outputs of tokens after a depth; those that are not running keep what they have.

    With p the probability that a halting unit gives and h the sum so far, a token halts when h + p exceeds the
    threshold. Its share u of the result is then the remainder r = 1 - h, and p before. Without ``output`` the unit
    reads the state y after the layer, and u y + (1 - u) x is the new state (Simoulin and Crabbe, 2021). With it the
    unit reads the state x before, y is the new state, and the output o becomes u y + (1 - u) o (Dehghani et al., 2019).

    Args:
        before, after: ... x C, states at the input and at the output of the layer
        weight: C, of the halting unit
        bias: 1, of the halting unit
        halting: ..., sums of the probabilities so far, at least float32; so is all arithmetic
        remainders: ..., of tokens that have halted
        running: ..., true at tokens that have not; what the layer made of others is ignored
        threshold: in (0, 1]
        output: ... x C, at least float32, or None
    """
    after = torch.where(running.unsqueeze(-1), after, before)
    seen = (after if output is None else before).to(halting.dtype)
    p = F.linear(seen, weight.to(seen.dtype)[None], bias.to(seen.dtype)).squeeze(-1).sigmoid()
    return update(before, after, p, halting, remainders, running, threshold, output)


def update(before, after, p, halting, remainders, running, threshold, output=None) -> Update:
    """:func:`halting_update` with the probabilities p, ..., of any halting unit."""
    after = torch.where(running.unsqueeze(-1), after, before)
    p = torch.where(running, p, 0)
    stops = running & (halting + p > threshold)
    remainders = torch.where(stops, 1 - halting, remainders)
    share = torch.where(stops, remainders, p)
    old = before if output is None else output
    blended = (after * share.unsqueeze(-1) + old * (1 - share.unsqueeze(-1))).to(old.dtype)
    state, output = (blended, None) if output is None else (after.to(before.dtype), blended)
    return Update(state, output, halting + share, remainders, running & ~stops, p)

"""Similar tokens become one: Bolya et al., *Token Merging: Your ViT But Faster* (ICLR 2023), written from the paper.

Before each depth but the first some tokens of a sequence are merged into others that are like them. The mean of both,
weighted by how many tokens each stands for, goes on; attention counts its key as often; and in the end every token has the
state of the one that stands for it. Nothing is learned: a model can be trained with it, or without.
"""

from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules.policies.base import Choice, Merged, Router, upcast
from fairseq_adaptive.modules.policies.ranking import in_order
from fairseq_adaptive.modules.policies.registry import register_policy

MOST = 0.5  # only every other token can be merged away at a depth


@register_policy("token_merging")
class TokenMerging(Router, nn.Module):
    """Bipartite soft matching (section 3): of the tokens of a sequence, in their order, every other is drawn to the one
    most like it of the rest, and the closest pairs are merged.

    In the paper this happens between attention and feed-forward, and the keys of that attention say which tokens are alike.
    Here a router is asked before a depth, half a layer later, and the states say it, by their cosine. So there are N - 1
    mergings in a stack of N depths. The placement, the algorithm and the attention are from summaries of the paper that
    quote it, not from the paper itself.

    Args:
        dim: C
        depths: N
        r: how many tokens are merged away at a depth, of a sequence that has twice as many; for inputs of one length
        share: of the tokens of a sequence at a depth, rounded down, in place of ``r``; for inputs of many lengths (default:
            0.1 where there is no ``r``)

    Raises:
        UsageError: for numbers that are impossible, and both of them
    """

    merges = True
    unsteered = "whose share of merged tokens says how much is computed: give --router-args '{\"share\": ...}'"

    def __init__(self, dim: int, depths: int, r: Optional[int] = None, share: Optional[float] = None):
        super().__init__()
        if r is not None and share is not None:
            raise UsageError("r and share both say how many tokens are merged: leave one of them out")
        if r is not None and (not isinstance(r, int) or isinstance(r, bool) or r < 0):
            raise UsageError(f"r {r!r}: it is how many tokens are merged at a depth, a whole number from 0")
        share = 0.1 if share is None else share
        if not isinstance(share, (int, float)) or not 0 <= share <= MOST:
            raise UsageError(f"share {share!r}: it is the share of tokens that is merged at a depth, from 0 to {MOST}")
        self.r, self.share = r, float(share)

    def start(self, x):
        return {"size": torch.ones_like(upcast(x[..., 0]))}

    def room(self, lengths: Tensor) -> Tensor:
        """How many tokens of sequences are merged away at a depth at which they have ``lengths``; both B."""
        return (lengths.double() * self.share).long() if self.r is None else torch.full_like(lengths, self.r)

    def choose(self, depth, x, carry, asked, sentence, protected, causal):
        """A choice depends on the tokens of a sequence that are asked, and on no others: neither padding nor tokens that have
        halted are merged, nor protected ones."""
        size = carry["size"]
        run = torch.ones_like(size)
        if not depth:
            return Choice(run, run)
        free = asked if protected is None else asked & ~protected
        numbers, lengths = in_order(asked, sentence)
        x, size, into = x.flatten(0, -2), size.flatten(), torch.arange(size.numel(), device=size.device)
        gone, to = match(x, numbers, free.flatten(), self.room(lengths))
        if gone.numel():
            run = run.flatten().index_fill(0, gone, 0.0).view(run.shape)
            into = into.index_copy(0, gone, to)
            x, size = merge(x, size, gone, to)
        x, size = x.unflatten(0, run.shape), size.view(run.shape)
        return Choice(run, run, {"size": size}, merged=Merged(x, size, into))

    def lever(self, trace):
        """None: there is no price."""

    def turn(self, position, causal=False):
        self.r, self.share = None, MOST * (1 - position)
        return {"router_args": {"r": None, "share": self.share}}

    def macs(self, counts):
        """The comparison of every other token with the rest."""
        if not counts.depth:
            return 0.0
        asked = torch.as_tensor(counts.asked).long().view(1) if counts.lengths is None else counts.lengths
        pairs = (asked // 2) * ((asked + 1) // 2) * (self.room(asked) > 0)
        return pairs.sum().double() * counts.dim


def match(x: Tensor, numbers: Tensor, free: Tensor, room: Tensor) -> Tuple[Tensor, Tensor]:
    """Which tokens are merged into which.

    Args:
        x: P x C, states
        numbers: B x L, in their order the tokens of each sequence, as numbers among the P; -1 behind the last
        free: P, true at tokens that may be merged
        room: B, how many of each are merged at most

    Returns:
        the numbers of those merged away, and of those that stand for them
    """
    ours, others = numbers[:, ::2], numbers[:, 1::2]
    if not others.size(1) or not bool(room.any()):
        return numbers.flatten()[:0], numbers.flatten()[:0]
    with torch.autocast(x.device.type, enabled=False):
        unit = F.normalize(upcast(x.detach()), dim=-1)
        alike = unit[ours] @ unit[others].transpose(1, 2)
    for each, dim in ((ours, 2), (others, 1)):
        alike = alike.masked_fill(~((each >= 0) & free[each]).unsqueeze(dim), -torch.inf)
    closest, partner = alike.max(-1)
    best = closest.argsort(dim=1, descending=True, stable=True).argsort(1) < room.unsqueeze(1)
    best = best & closest.isfinite()
    return ours[best], others.gather(1, partner)[best]


def merge(x: Tensor, size: Tensor, gone: Tensor, to: Tensor) -> Tuple[Tensor, Tensor]:
    """States and sizes, P x C and P, of which those of ``to`` are the means with, and the sums of, those of ``gone``."""
    total = size.index_add(0, to, size.index_select(0, gone))
    weighted = upcast(x) * size.unsqueeze(-1)
    mean = weighted.index_add(0, to, weighted.index_select(0, gone)) / total.unsqueeze(-1)
    return torch.where((total > size).unsqueeze(-1), mean.to(x.dtype), x), total

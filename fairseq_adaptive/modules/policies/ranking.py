"""Scores of tokens, and who is best: what routers with a capacity share."""

import math
from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules.policies.base import upcast


class Score(nn.Linear):
    """Scores of tokens, ... x C -> ... x K, in float32 and more: half precision makes ties of near ones."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            x = upcast(x)
            return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


def small_mlp(dim: int, count: int = 1) -> nn.Module:
    """Scores with 2 C hidden units between."""
    return nn.Sequential(Score(dim, 2 * dim), nn.GELU(), Score(2 * dim, count))


def best(key: Tensor, room: Tensor, asked: Tensor, sentence: Tensor, protected=None) -> Tensor:
    """..., true at the ``room`` (B) tokens of each sequence that have the greatest keys, of those that are asked."""
    shape, sentence, asked = key.shape, sentence.flatten(), asked.flatten()
    key = key.detach().double().flatten().masked_fill(~asked, -torch.inf)
    if protected is not None:
        key = key.masked_fill(protected.flatten() & asked, torch.inf)
    order = key.argsort(descending=True, stable=True)
    order = order[sentence[order].argsort(stable=True)]  # by sequence, the best first
    counts, place = sentence.bincount(minlength=len(room)), torch.empty_like(order)
    place[order] = torch.arange(len(order), device=key.device)
    place = place - (counts.cumsum(0) - counts)[sentence]
    return ((place < room[sentence]) & asked).view(shape)


def in_order(asked: Tensor, sentence: Tensor) -> Tuple[Tensor, Tensor]:
    """The tokens of each sequence that are asked, by their numbers among all (flattened), in their order: B x L, -1 behind
    the last; and how many they are, B."""
    sentence = sentence.flatten()
    number = asked.flatten().nonzero().squeeze(1)
    number = number[sentence[number].argsort(stable=True)]
    lengths = count(asked.flatten(), sentence)
    place = torch.arange(len(number), device=number.device) - (lengths.cumsum(0) - lengths)[sentence[number]]
    found = number.new_full((len(lengths), int(lengths.max()) if len(lengths) else 0), -1)
    found[sentence[number], place] = number
    return found, lengths


def by_row(step, room: Tensor, asked: Optional[Tensor] = None) -> Tensor:
    """B x T, :func:`best` at a depth of a trace, by what its router's choice was drawn from."""
    asked = step.asked if asked is None else asked
    rows = torch.arange(len(asked), device=asked.device)[:, None].expand_as(asked)
    return best(step.keeping, room, asked, rows)


def bound_of(threshold: float) -> float:
    """The logit of a probability.

    Raises:
        UsageError: for one that is not above 0 and below 1
    """
    if not 0 < threshold < 1:
        raise UsageError(f"a threshold of {threshold} is impossible: it is above 0 and below 1")
    return math.log(threshold / (1 - threshold))


def turned(position: float) -> float:
    """Of a dial's position the threshold of a probability, by which more tokens go on the higher it is."""
    return min(1 - 1e-6, max(1e-6, 1 - position))


def count(asked: Tensor, sentence: Tensor) -> Tensor:
    """B, how many tokens of each sequence are asked."""
    return sentence[asked].bincount(minlength=int(sentence.max()) + 1 if sentence.numel() else 0)

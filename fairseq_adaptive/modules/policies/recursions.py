"""What the routers of Mixture-of-Recursions (Bae et al., 2025) share: they are asked once for a whole block of layers.

Depths that a layer of their own serves before and after the shared ones compute all tokens. Those between are R
recursions of equal length. Others see nothing of a token that is left out of one (``--router-kv active``, the
recursion-wise cache), or all tokens as the first recursion saw them (``first``, the shared cache).
"""

import abc
from typing import Optional, Sequence

import torch
from torch import nn

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules.policies.base import Choice, Router, where_token


class Recursions(Router, nn.Module):
    """A router that is asked once a recursion, and weighs what whole recursions made of a token.

    It carries the ``state`` that a token had before; the ``gate`` of what is added to it; whether the token is ``active``;
    and whether it is ``over`` after this depth, when the state before and the gated output make the new state.
    """

    monotone, weighs = False, True
    unsteered = (
        "whose price keeps recursions equally frequent: turn it after the training (dial), or give --router-args"
    )

    def __init__(self, depths: int, schedule: Sequence[int], recursions: Optional[int], warmup: int):
        super().__init__()
        schedule = tuple(schedule) or tuple(range(depths))
        shared = [depth for depth, number in enumerate(schedule) if schedule.count(number) > 1] or range(depths)
        self.first, length = shared[0], shared[-1] + 1 - shared[0]
        self.count = recursions or max(map(schedule.count, schedule))
        if self.count not in range(2, length + 1) or length % self.count:
            raise UsageError(
                f"{length} depths that share layers cannot be {self.count} recursions of equal length: share "
                "layers with --layer-sharing middle_cycle, or give --router-args '{\"recursions\": 3}'"
            )
        self.block, self.warmup, self.num_updates = length // self.count, warmup, 0
        begun = schedule[self.first : self.first + self.block]
        self.computes_all_first = set(begun) == set(schedule[self.first : self.first + length])

    def reset_parameters(self):
        for name, parameter in self.named_parameters():
            nn.init.zeros_(parameter) if name.endswith("bias") else nn.init.normal_(parameter, std=0.02)

    def set_num_updates(self, num_updates: int):
        """fairseq says before each update how many there were."""
        self.num_updates = num_updates

    def start(self, x):
        none = torch.zeros_like(x[..., 0])  # who joins within a recursion goes to its end
        return {"state": torch.zeros_like(x), "gate": none + 1, "active": none == 0, "over": none > 0}

    def choose(self, depth, x, carry, asked, sentence, protected, causal):
        recursion, place = divmod(depth - self.first, self.block)
        nobody = torch.zeros_like(asked)
        if not 0 <= recursion < self.count:
            ones = x.new_ones(x.shape[:-1])
            return Choice(ones, ones, {**carry, "over": nobody})
        probability, score = carry["active"].to(x), None
        if not place:
            probability, score, carry = self.begin(recursion, x, carry, asked, sentence, protected, causal)
        over = self.ends(recursion, carry) if place == self.block - 1 else nobody
        return Choice(carry["active"].to(probability), probability, {**carry, "over": over}, score)

    def combine(self, before, after, choice):
        whole = choice.carry["state"] + choice.carry["gate"].unsqueeze(-1).to(after) * after
        return where_token(choice.run > 0, where_token(choice.carry["over"], whole, after), before)

    def begun(self, trace):
        """The steps at which recursions began."""
        return trace.steps[self.first : self.first + self.count * self.block : self.block]

    def lever(self, trace):
        """None: no weight of the price changes how much is computed."""

    def macs(self, counts):
        """Those of the units that are asked where a recursion begins."""
        recursion, place = divmod(counts.depth - self.first, self.block)
        if place or not 0 <= recursion < self.count:
            return 0.0
        return counts.asked * sum(each.numel() for unit in self.units(recursion) for each in unit.parameters())

    @abc.abstractmethod
    def units(self, recursion: int):
        """What is asked at the beginning of a recursion, modules."""

"""Mixture-of-Recursions (Bae et al., 2025): a block of layers is repeated, and tokens go through it as often as they need.

Depths that a layer of their own serves before and after the shared ones compute all tokens. Those between are R recursions
of equal length. Others see nothing of a token that is left out of one (``--router-kv active``, the recursion-wise cache), or
all tokens as the first recursion saw them (``first``, the shared cache). Here is expert choice, equal to the public router
(github.com/raymin0223/mixture_of_recursions) on equal weights.
"""

import math
from typing import Optional, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules.policies.base import Choice, Router, where_token
from fairseq_adaptive.modules.policies.mixture_of_depths import Score, best, count, small_mlp
from fairseq_adaptive.modules.policies.registry import register_policy

_GATES = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "none": lambda x: x}


class Recursions(Router, nn.Module):
    """A router that is asked once a recursion, and weighs what whole recursions made of a token.

    It carries the ``state`` that a token had before; the ``gate`` of what is added to it; whether the token is ``active``;
    and whether it is ``over`` after this depth, when the state before and the gated output make the new state.
    """

    monotone, weighs = False, True

    def __init__(self, depths: int, schedule: Sequence[int], recursions: Optional[int], warmup: int):
        super().__init__()
        schedule = tuple(schedule) or tuple(range(depths))
        shared = [depth for depth, number in enumerate(schedule) if schedule.count(number) > 1] or range(depths)
        self.first, length = shared[0], shared[-1] + 1 - shared[0]
        self.count = recursions or max(map(schedule.count, schedule))
        if self.count not in range(2, length + 1) or length % self.count:
            raise UsageError(f"{length} depths that share layers cannot be {self.count} recursions of equal length: share "
                             "layers with --layer-sharing middle_cycle, or give --router-args '{\"recursions\": 3}'")
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
        return counts.asked / counts.depths * sum(each.numel() for each in self.parameters())


@register_policy("mixture_of_recursions")
class ExpertChoice(Recursions):
    """Recursion r takes the best of the tokens that the one before took: (R - r) / R of the whole sequence.

    In evaluation of a decoder, where the best are not known, it takes those with a probability of ``threshold`` and more
    (our own; the published evaluation looks ahead); a recursion that has room for all takes all.

    Args:
        dim, depths, schedule: of a :class:`~fairseq_adaptive.modules.policies.base.Place`
        recursions: R (default: how often the layers are repeated)
        gate: of a score: ``sigmoid``, ``tanh`` or ``none``
        alpha: scales the gate
        warmup: over how many updates the shares go down from 1, along a cosine
        threshold: see above
        auxiliary: routers of their own, which read the states without a gradient, say who is taken in evaluation, and are
            what the price teaches
        z_loss: weight of the mean square of the scores in the price
        mlp: routers have a hidden layer of 2 C

    Raises:
        UsageError: for values that are impossible
    """

    weight = 0.001  # of the price, as published

    def __init__(self, dim: int, depths: int, schedule: Sequence[int] = (), recursions: Optional[int] = None,
                 gate: str = "sigmoid", alpha: float = 0.1, warmup: int = 0, threshold: float = 0.5,
                 auxiliary: bool = False, z_loss: float = 0.0, mlp: bool = False):
        super().__init__(depths, schedule, recursions, warmup)
        if gate not in _GATES or not 0 < threshold < 1:
            raise UsageError(f"gate {gate!r} must be one of {', '.join(_GATES)}, and threshold {threshold} between 0 and 1")
        if auxiliary and z_loss:
            raise UsageError("z_loss is for scores that the price teaches: leave out auxiliary")
        self.gate, self.alpha, self.z_loss = _GATES[gate], alpha, z_loss
        self.bound = math.log(threshold / (1 - threshold))
        self.unit = nn.ModuleList(small_mlp(dim) if mlp else Score(dim, 1, bias=False) for _ in range(self.count))
        self.auxiliary = nn.ModuleList(small_mlp(dim) for _ in self.unit) if auxiliary else None
        self.reset_parameters()

    def start(self, x):
        return {**super().start(x), "length": torch.zeros_like(x[..., 0], dtype=torch.long)}

    def share(self, recursion: int) -> float:
        """Which part of a sequence a recursion has room for, at present."""
        share, done = (self.count - recursion) / self.count, 1.0
        if self.training and self.warmup:
            done = min(1.0, self.num_updates / self.warmup)
        return share + (1 - share) * (1 + math.cos(math.pi * done)) / 2

    def begin(self, recursion, x, carry, asked, sentence, protected, causal):
        open_to, share, length = asked & carry["active"], self.share(recursion), carry["length"]
        score = guess = self.unit[recursion](x).squeeze(-1)
        if self.auxiliary is not None:
            guess = self.auxiliary[recursion](x.detach()).squeeze(-1)
        if causal and not self.training:
            chosen = (guess >= self.bound) | (share >= 1)
            chosen = open_to & (chosen if protected is None else chosen | protected)
        else:
            there = count(asked, sentence)
            if not recursion:
                length = there[sentence]
            longest = torch.zeros_like(there).scatter_reduce(0, sentence.flatten(), length.flatten(), "amax")
            chosen = best(score, (share * longest.double()).long().clamp_min(1), open_to, sentence, protected)
        gate = self.alpha * self.gate(score)
        return guess.sigmoid(), guess, {"state": x, "gate": gate, "active": chosen, "length": length}

    def ends(self, recursion, carry):
        return torch.ones_like(carry["active"])

    def price(self, trace) -> Tensor:
        """How badly the scores say who is taken: for each recursion the mean binary cross-entropy over the tokens that
        could be, and of the squared score times ``z_loss``; the sum of them all."""
        total, open_to = super().price(trace), None
        for step in self.begun(trace):
            open_to = step.asked if open_to is None else step.asked & open_to
            taken = step.kept > 0
            loss = F.binary_cross_entropy_with_logits(step.score, taken.to(step.score), reduction="none")
            loss = (loss + self.z_loss * step.score**2) * open_to
            total, open_to = total + loss.sum() / open_to.sum().clamp_min(1), open_to & taken
        return total

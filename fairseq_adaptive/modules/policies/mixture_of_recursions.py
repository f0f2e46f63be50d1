"""Mixture-of-Recursions (Bae et al., 2025) by expert choice: each recursion takes the best of the tokens that the one
before took, and adds what the whole block made of them, weighted by their scores.

Equal to the public router (github.com/raymin0223/mixture_of_recursions) on equal weights.
"""

import math
from typing import Optional, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules.policies.ranking import Score, best, bound_of, by_row, count, small_mlp, turned
from fairseq_adaptive.modules.policies.recursions import Recursions
from fairseq_adaptive.modules.policies.registry import register_policy
from fairseq_adaptive.modules.policies.shift import Shifted

_GATES = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "none": lambda x: x}


@register_policy("mixture_of_recursions")
class ExpertChoice(Shifted, Recursions):
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
        capacity: scales these parts in evaluation of what is not a decoder (default: they stay as in training); more than
            the whole sequence is the whole sequence

    Attributes:
        shift: of the parts' logarithm, where a target has moved them

    Raises:
        UsageError: for values that are impossible
    """

    weight = 0.001  # of the price, as published
    movable, unsteered = True, ""

    def __init__(
        self,
        dim: int,
        depths: int,
        schedule: Sequence[int] = (),
        recursions: Optional[int] = None,
        gate: str = "sigmoid",
        alpha: float = 0.1,
        warmup: int = 0,
        threshold: float = 0.5,
        auxiliary: bool = False,
        z_loss: float = 0.0,
        mlp: bool = False,
        capacity: Optional[float] = None,
    ):
        super().__init__(depths, schedule, recursions, warmup)
        if gate not in _GATES or not (capacity is None or 0 < capacity <= 1000):
            raise UsageError(
                f"gate {gate!r} must be one of {', '.join(_GATES)}, and capacity {capacity} above 0 and up to 1000"
            )
        if auxiliary and z_loss:
            raise UsageError("z_loss is for scores that the price teaches: leave out auxiliary")
        self.gate, self.alpha, self.z_loss = _GATES[gate], alpha, z_loss
        self.bound, self.scale = bound_of(threshold), capacity
        self.unit = nn.ModuleList(small_mlp(dim) if mlp else Score(dim, 1, bias=False) for _ in range(self.count))
        self.auxiliary = nn.ModuleList(small_mlp(dim) for _ in self.unit) if auxiliary else None
        self.register_shift()
        self.reset_parameters()

    def start(self, x):
        return {**super().start(x), "length": torch.zeros_like(x[..., 0], dtype=torch.long)}

    def turn(self, position, causal=False):
        """Set the capacity, in a decoder the threshold."""
        if causal:
            self.bound = bound_of(turned(position))
            return {"router_args": {"threshold": turned(position)}}
        self.scale = self.count * max(1e-6, position)
        return {"router_args": {"capacity": self.scale}}

    def share(self, recursion: int, by: float = 0.0) -> float:
        """Which part of a sequence a recursion has room for at present, all parts moved ``by`` so much."""
        share, done = min(1.0, self.shifted((self.count - recursion) / self.count, by)), 1.0
        if self.training and self.warmup:
            done = min(1.0, self.num_updates / self.warmup)
        return share + (1 - share) * (1 + math.cos(math.pi * done)) / 2

    def begin(self, recursion, x, carry, asked, sentence, protected, causal):
        open_to, share, length = asked & carry["active"], self.share(recursion), carry["length"]
        if self.scale is not None and not (causal or self.training):
            share = min(1.0, self.scale * (self.count - recursion) / self.count)
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

    def decided(self, trace, by=0.0):
        """As :meth:`Policy.decided`; the parts moved ``by`` so much in their logarithm."""
        if not by:
            return super().decided(trace)
        found, length = [], None
        for depth, step in enumerate(trace.steps):
            recursion, place = divmod(depth - self.first, self.block)
            if not 0 <= recursion < self.count:
                found.append(step.alive)
            elif place:
                found.append(found[-1] & step.asked)
            else:
                length = step.asked.sum(1) if length is None else length
                asked = step.asked & found[-1] if recursion else step.asked
                found.append(by_row(step, (self.share(recursion, by) * length).long().clamp_min(1), asked))
        return found

    def units(self, recursion):
        return [self.unit[recursion]] + ([] if self.auxiliary is None else [self.auxiliary[recursion]])

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

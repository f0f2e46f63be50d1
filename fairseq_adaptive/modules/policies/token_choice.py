"""The other router of Mixture-of-Recursions (Bae et al., 2025): each token chooses its number of recursions, once.

As described in the paper and in our notes of the public code (github.com/raymin0223/mixture_of_recursions), whose token
choice router could not be read: the equations here are not checked against it.
"""

from typing import Optional, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules.policies.ranking import Score, small_mlp
from fairseq_adaptive.modules.policies.recursions import Recursions
from fairseq_adaptive.modules.policies.registry import register_policy
from fairseq_adaptive.modules.policies.shift import FARTHEST, Shifted


@register_policy("token_choice")
class TokenChoice(Shifted, Recursions):
    """At the first recursion a token gets the number of its last one, which depends on nothing but itself.

    Between recursions a state is what the layers made; at the end, weighted by the chance of the choice, it is added to
    the state before the first.

    Args:
        dim, depths, schedule, recursions, mlp: as of
            :class:`~fairseq_adaptive.modules.policies.mixture_of_recursions.ExpertChoice`
        function: of the scores: ``softmax``, or ``sigmoid``
        alpha: scales its values
        balance: what keeps the numbers equally frequent: ``loss``, the price; or ``bias``, added to the chances for the
            choice alone, and moved after each training step by ``rate``, up for a number that is too rare
        rate: see ``balance``
        warmup: before so many updates all tokens go to the last recursion
        z_loss: weight of the mean square of the scores' logsumexp in the price

    Attributes:
        shift: where a dial has moved it, each recursion more is e to this as probable for the choice

    Raises:
        UsageError: for values that are impossible
    """

    weight = 0.1  # of the price, as published

    def __init__(
        self,
        dim: int,
        depths: int,
        schedule: Sequence[int] = (),
        recursions: Optional[int] = None,
        function: str = "softmax",
        alpha: float = 1.0,
        balance: str = "loss",
        rate: float = 0.001,
        warmup: int = 0,
        z_loss: float = 0.0,
        mlp: bool = False,
    ):
        super().__init__(depths, schedule, recursions, warmup)
        if function not in ("softmax", "sigmoid") or balance not in ("loss", "bias"):
            raise UsageError(f"function {function!r} must be softmax or sigmoid, and balance {balance!r} loss or bias")
        self.function, self.alpha, self.balance, self.rate, self.z_loss = function, alpha, balance, rate, z_loss
        self.unit = small_mlp(dim, self.count) if mlp else Score(dim, self.count, bias=False)
        self.register_buffer("bias", torch.zeros(self.count) if balance == "bias" else None)
        self.register_shift()
        self.reset_parameters()

    def start(self, x):
        carry = super().start(x)
        chances = carry["gate"].unsqueeze(-1).expand(*x.shape[:-1], self.count)
        return {**carry, "chances": chances, "last": torch.full_like(carry["over"], self.count - 1, dtype=torch.long)}

    def begin(self, recursion, x, carry, asked, sentence, protected, causal):
        score = None
        if not recursion:
            scores = self.unit(x)
            score = scores.logsumexp(-1)
            chances = self.alpha * (scores.softmax(-1) if self.function == "softmax" else scores.sigmoid())
            carry = {**carry, "state": x, "chances": chances, "last": self._last(chances, asked, protected)}
            carry["gate"] = chances.gather(-1, carry["last"].unsqueeze(-1)).squeeze(-1)
        left = carry["chances"][..., recursion:].sum(-1) / carry["chances"].sum(-1)
        return left, score, {**carry, "active": asked & (carry["last"] >= recursion)}

    def turn(self, position, causal=False):
        """Let tokens choose fewer recursions or more, which is saved with the weights."""
        self.set_shift(FARTHEST * (2 * position - 1))
        return {}

    @torch.no_grad()
    def _last(self, chances, asked, protected):
        if self.training and self.num_updates < self.warmup:
            return torch.full_like(chances[..., 0], self.count - 1, dtype=torch.long)
        chances = chances if self.bias is None else chances + self.bias.to(chances)
        if self.shift is not None:
            chances = chances * (self.shift * torch.arange(self.count, device=chances.device)).exp().to(chances)
        last = chances.argmax(-1)
        if self.bias is not None and self.training:
            load = last[asked].bincount(minlength=self.count).to(self.bias)
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(load)  # else the workers' biases drift apart
            self.bias += self.rate * (load.mean() - load).sign()
        return last if protected is None else last.masked_fill(protected, self.count - 1)

    def units(self, recursion):
        return [] if recursion else [self.unit]

    def ends(self, recursion, carry):
        return carry["last"] == recursion

    def price(self, trace) -> Tensor:
        """How unequally the numbers are chosen, 1 where they are equally frequent: R times the sum of the mean chance of
        each times its frequency, with ``balance`` ``loss``; and ``z_loss``."""
        steps, total = self.begun(trace), super().price(trace)
        if not steps:
            return total
        tokens = steps[0].asked.sum().clamp_min(1)
        if self.z_loss:
            total = total + self.z_loss * (steps[0].score ** 2 * steps[0].asked).sum() / tokens
        if self.balance == "bias":
            return total
        both = [(step.keeping, (step.kept > 0).to(step.keeping)) for step in steps]
        chances, loads = (
            torch.stack([(each * step.asked).sum() for each, step in zip(found, steps)]) / tokens
            for found in zip(*both)
        )
        chances, loads = (each - F.pad(each[1:], (0, 1)) for each in (chances, loads))  # from "at least" to "exactly"
        return total + self.count * (chances * loads).sum()

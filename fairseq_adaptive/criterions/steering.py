"""What follows the targets of a training: controllers that count what batches spend, and move weights and thresholds."""

import logging
from typing import Dict, Iterator, List, Optional, Tuple

import torch

from fairseq_adaptive.criterions.controller import Controller
from fairseq_adaptive.criterions.decisions import Decision
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules.stack.compute import decided, stack_macs

logger = logging.getLogger(__name__)

PATIENCE = 100  # updates in a row with all tokens at one end before a warning


class Steering:
    """The controllers of a criterion, each with the policies of its kind.

    Args:
        controllers: by kind of policy
        advice: what to change where no token runs on, and where none halts
    """

    def __init__(self, controllers: Dict[str, Controller], advice: Tuple[str, str]):
        self.controllers, self.advice, self._at_ends = controllers, advice, [0, 0]

    def prepare(self, updates: Optional[int]) -> None:
        """Say how many updates the training has; None: no end."""
        for controller in self.controllers.values():
            controller.horizon = updates

    def report(self, updates: int) -> None:
        """Warn of targets that were missed after so many updates."""
        for controller in self.controllers.values():
            said = controller.missed(updates)
            if said:
                logger.warning(said)

    def _steered(self, found: List[Decision]) -> Iterator[Tuple]:
        """The controllers that follow a training, each with its decisions and what they spend where nothing is saved."""
        for kind, controller in self.controllers.items():
            mine = [each for each in found if each.policy.kind == kind]
            if mine and (controller.steers or kind == "halting"):
                yield controller, mine, max(map(controller.target.most, mine))

    def advance(self, found: List[Decision], update: int) -> None:
        """Steer by the update before, ahead of all batches of this one: they are one, however they are divided."""
        for controller in self.controllers.values():
            controller.forget()
        for controller, mine, most in self._steered(found):
            move = controller.advance(update, most)
            for each in mine if move else ():
                each.policy.move(move)

    def count(self, found: List[Decision], update: int) -> None:
        """Count what a batch has spent."""
        for controller, mine, most in self._steered(found):
            if controller.target.flops and any(each.macs is None for each in mine):
                raise UsageError(f"{controller.target.flag} needs layers that say by macs(work) what they cost")
            spent = [sum(each) for each in zip(*map(controller.target.spent, mine))]
            band = controller.band(update, most, all(each.policy.lever(each.trace) is None for each in mine))
            ratio = controller.count(*spent, self._way(band, mine, *spent))
            if controller.target.kind == "halting" and controller.value is None:
                self._warn_of_collapse(ratio, most)

    @staticmethod
    @torch.no_grad()
    def _way(band, mine, spent, total) -> float:
        """How far the thresholds of policies are from where a batch is within its band."""
        if band is None or not all(each.policy.movable for each in mine) or band[0] <= spent / total <= band[1]:
            return 0.0
        aim, sign = (band[1], -1) if spent / total > band[1] else (band[0], 1)
        near, far = 0.0, 30.0
        for _ in range(12):
            way = (near + far) / 2
            moved = (
                stack_macs(each.stack, each.trace, decided(each.stack, each.trace, sign * way), each.reader)[0]
                for each in mine
            )
            if (float(sum(moved) / total) - aim) * sign < 0:
                near = way
            else:
                far = way
        return sign * far

    def _warn_of_collapse(self, depth, limit):
        if limit == 1:
            return
        for end, reached in enumerate((depth < 1.01, depth > limit - 0.01)):
            self._at_ends[end] = self._at_ends[end] + 1 if reached else 0
        if self._at_ends[0] == PATIENCE:
            logger.warning(
                "all tokens have halted at the first step for %d updates: there the halting unit gets no "
                "gradient any more. Start again with %s",
                PATIENCE,
                self.advice[0],
            )
        if self._at_ends[1] == PATIENCE:
            logger.warning(
                "no token has halted before the last of %d steps for %d updates: %s, or set --target-depth",
                limit,
                PATIENCE,
                self.advice[1],
            )

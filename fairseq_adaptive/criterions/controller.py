"""A price that follows what a model spends, for losses with a target."""

from typing import Callable, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from fairseq_adaptive.ranges import POSITIVE, POSITIVE_SHARE, Range

DEPTH = Range(float, 1, 1000)  # every token takes at least 1 update
TAPE = Range(float, 0, 10000, above=True)


def warmed_up(update: int, updates: int) -> float:
    """The share of a price that is due when it rises from 0 within ``updates`` updates."""
    return min(1.0, update / updates) if updates else 1.0


class Target(NamedTuple):
    """What ``--target-...`` steers.

    Attributes:
        flag: the flag
        kind: of the policies that it steers
        state: name of the controller's state in that of the task
        sums: names, in the state, of what was spent and of what that is a share
        spent: maps a :class:`~fairseq_adaptive.criterions.decisions.Decision` to both
        most: maps it to their ratio where nothing is saved
        within: the targets that are possible in any model
        unit: what a model has ``most`` of; None: a target may be above it
        relative: an excess is measured in targets
        scale: default weight of the steering
    """

    flag: str
    kind: str
    state: str
    sums: Tuple[str, str]
    spent: Callable
    most: Callable
    within: Range
    unit: Optional[str]
    relative: bool
    scale: float


TARGETS = {
    "depth": Target(
        "--target-depth",
        "halting",
        "ponder",
        ("depths", "tokens"),
        lambda each: (each.trace.updates.sum(), each.trace.tokens.sum()),
        lambda each: len(each.stack.halting_depths),
        DEPTH,
        "depths",
        True,
        0.1,
    ),
    "flops": Target(
        "--target-flops",
        "router",
        "skimming",
        ("spent", "dense"),
        lambda each: each.macs,
        lambda each: 1.0,
        POSITIVE_SHARE,
        None,
        False,
        1.0,
    ),
    "tape": Target(
        "--target-tape",
        "reader",
        "tape",
        ("tokens", "sequences"),
        lambda each: (each.trace.tape_len.sum(), torch.tensor(len(each.trace.tokens))),
        lambda each: each.policy.room,
        TAPE,
        "tape tokens",
        True,
        0.1,
    ),
    "compute": Target(
        "--target-compute",
        "search",
        "search",
        ("compute", "batches"),
        lambda each: (each.policy.compute(each.trace), torch.tensor(1)),
        lambda each: 1.0,
        POSITIVE,
        None,
        True,
        1.0,
    ),
}


class Controller:
    """A proportional and integral controller; our own.

    What counts is the excess of the update before, over all its batches and workers. The state lies in that of the
    task, so that a resumed training goes on exactly.

    Args:
        task: a fairseq task
        target: what is steered
        value: what to steer to; None: nothing is steered
        gain: weight of the excess
        rate: by how much the sum of excesses grows in an update with an excess of 1
        weight: of both (default: the target's)
        warmup_updates: updates in which the target falls from what a model spends that saves nothing

    Raises:
        UsageError: for a value that is impossible
    """

    def __init__(
        self,
        task,
        target: Target,
        value: Optional[float] = None,
        gain: float = 1.0,
        rate: float = 0.01,
        weight: Optional[float] = None,
        warmup_updates: int = 0,
    ):
        if value is not None:
            target.within.check(value, target.flag)
        self.task, self.target, self.value, self.gain, self.rate = task, target, value, gain, rate
        self.weight, self.warmup_updates = target.scale if weight is None else weight, warmup_updates
        start = {"excess": 0.0, "sum": 0.0, "update": -1, **dict.fromkeys(target.sums, 0.0)}
        task.state.add_factory(target.state, lambda: dict(start))

    @property
    def state(self):
        return getattr(self.task.state, self.target.state)

    @property
    def factor(self) -> float:
        """What the policies' levers weigh in this update."""
        return self.weight * (self.gain * self.state["excess"] + self.state["sum"])

    def advance(self, update: int, most: float = 1.0) -> None:
        """Steer by the update before, where this is the first batch of another one. To be called before the price is
        asked for, so that all batches of an update have one price, be they several of a worker or one each of several.

        Args:
            update: how many updates there were before this one
            most: what a model spends that saves nothing
        """
        state = self.state
        if state["update"] == update:
            return
        spent, total = (state[name] for name in self.target.sums)
        if total and self.value is not None:
            aim = most - (most - self.value) * warmed_up(update, self.warmup_updates)
            state["excess"] = spent / total / aim - 1 if self.target.relative else spent / total - aim
            if state["sum"] * state["excess"] < 0:
                state["sum"] *= 0.9  # what grew on the way must not carry the ratio past the target
            state["sum"] += self.rate * state["excess"]
        state.update(update=update, **dict.fromkeys(self.target.sums, 0.0))

    @torch.no_grad()
    def count(self, spent: Tensor, total: Tensor) -> float:
        """Count a batch, one of every worker at a time.

        Args:
            spent, total: scalars

        Returns:
            ``spent / total`` of all workers
        """
        counts = torch.stack((spent.double(), total.to(spent.device).double()))
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(counts)
        for name, count in zip(self.target.sums, counts.tolist()):
            self.state[name] += count
        return float(counts[0] / counts[1])

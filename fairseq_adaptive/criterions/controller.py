"""A price that follows what a model spends, for losses with a target."""

import math
from typing import Callable, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from fairseq_adaptive.ranges import POSITIVE, POSITIVE_SHARE, Range

DEPTH = Range(float, 1, 1000)  # every token takes at least 1 update
TAPE = Range(float, 0, 10000, above=True)
RATE = 0.01  # by default, where there are as many updates as here or more
UPDATES = 1000
TOLERANCE = 0.03  # a target that is missed by more of itself is missed


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
        advice: what to change where the target is missed from above
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
    advice: str

    @property
    def flops(self) -> bool:
        """Whether multiply-adds of layers are steered."""
        return self.spent is _macs


def _macs(decision):
    return decision.macs


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
        "a higher halting bias (--halting-args)",
    ),
    "flops": Target(
        "--target-flops",
        "router",
        "skimming",
        ("spent", "dense"),
        _macs,
        lambda each: 1.0,
        POSITIVE_SHARE,
        None,
        False,
        1.0,
        "a lower --skim-bias or capacity",
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
        "a lower --tape-threshold",
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
        "a higher learning rate of the architecture (--architecture-lr)",
    ),
}
# what --compute steers: the multiply-adds of the layers, whatever decides
COMPUTE = {
    "flops": TARGETS["flops"]._replace(flag="--compute", state="compute_router"),
    "share": TARGETS["flops"]._replace(
        flag="--compute",
        kind="halting",
        state="compute_halting",
        scale=TARGETS["depth"].scale,
        relative=True,
        advice=TARGETS["depth"].advice,
    ),
    "compute": TARGETS["compute"]._replace(flag="--compute", state="compute_search"),
}


class Controller:
    """A proportional and integral controller; our own.

    Where a policy has thresholds that can be moved (:meth:`~fairseq_adaptive.modules.policies.Policy.move`), they are, so
    that what is spent keeps within a band: above the target, and below a bound that falls to the target in the first half
    of the training, or in ``warmup_updates``. The weight of a lever alone cannot promise that: how far an update goes is
    up to the learning rate.

    What counts is the excess of the update before, over all its batches and workers. The state lies in that of the
    task, so that a resumed training goes on exactly.

    Args:
        task: a fairseq task
        target: what is steered
        value: what to steer to; None: nothing is steered
        gain: weight of the excess
        rate: by how much the sum of excesses grows in an update with an excess of 1; None: 0.01, and more in a training of
            fewer than 1,000 updates, in which the sum shall get as far
        weight: of both (default: the target's)
        warmup_updates: updates in which the target falls from what a model spends that saves nothing
        steers: whether anything follows from it; else what is spent is watched, to be reported

    Attributes:
        horizon: how many updates the training has; None: unknown

    Raises:
        UsageError: for a value that is impossible
    """

    def __init__(
        self,
        task,
        target: Target,
        value: Optional[float] = None,
        gain: float = 1.0,
        rate: Optional[float] = None,
        weight: Optional[float] = None,
        warmup_updates: int = 0,
        steers: bool = True,
    ):
        if value is not None:
            target.within.check(value, target.flag)
        self.task, self.target, self.value, self.gain, self.rate = task, target, value, gain, rate
        self.weight, self.warmup_updates = target.scale if weight is None else weight, warmup_updates
        self.steers, self.horizon, self._watched = steers and value is not None, None, {}
        start = {"excess": 0.0, "sum": 0.0, "update": -1, **dict.fromkeys(target.sums, 0.0)}
        if steers:
            task.state.add_factory(target.state, lambda: dict(start))

    @property
    def state(self):
        return getattr(self.task.state, self.target.state)

    @property
    def pace(self) -> float:
        """The rate, in this training."""
        if self.rate is not None:
            return self.rate
        return RATE * max(1.0, UPDATES / (self.horizon or UPDATES))

    def band(self, update: int, most: float, alone: bool = False) -> Optional[Tuple[float, float]]:
        """Within which thresholds keep what is spent; None: they stay as they are.

        Args:
            alone: nothing but thresholds follows the target
        """
        horizon = self.horizon or (UPDATES if alone else None)
        if horizon is None or not self.steers:
            return None
        done = warmed_up(update, self.warmup_updates or max(1, horizon // 2))
        return self.value + self.gap, most - (most - self.value) * done + self.gap

    @property
    def gap(self) -> float:
        """By how much training spends more than evaluation did, the last time: dropout and other texts decide otherwise."""
        return max(-self.value / 4, min(self.value / 4, self.state.get("gap", 0.0)))

    @property
    def step(self) -> float:
        """Which part of the way to its band a threshold goes in an update: batches differ."""
        return min(1.0, max(0.1, 30 / (self.horizon or math.inf)))

    @property
    def factor(self) -> float:
        """What the policies' levers weigh in this update."""
        return self.weight * (self.gain * self.state["excess"] + self.state["sum"])

    def advance(self, update: int, most: float = 1.0) -> float:
        """Steer by the update before, where this is the first batch of another one. To be called before the price is
        asked for, so that all batches of an update have one price, be they several of a worker or one each of several.

        Args:
            update: how many updates there were before this one
            most: what a model spends that saves nothing

        Returns:
            by how much thresholds are to move, before this update
        """
        state, move = self.state, 0.0
        if state["update"] == update:
            return move
        spent, total = (state[name] for name in self.target.sums)
        if total and self.value is not None:
            aim = most - (most - self.value) * warmed_up(update, self.warmup_updates) + self.gap
            state["excess"] = spent / total / aim - 1 if self.target.relative else spent / total - aim
            if state["sum"] * state["excess"] < 0:
                state["sum"] *= 0.9  # what grew on the way must not carry the ratio past the target
            state["sum"] += self.pace * state["excess"]
            move = self.step * state.get("moves", 0.0) / total
            state["recent"] = 0.8 * state.get("recent", spent / total) + 0.2 * spent / total
            if state.get("evaluated") and self.horizon is not None and update >= self.horizon // 2:
                state["gap"] = state["recent"] - self.spent()  # not while the share still falls
        state.update(update=update, moves=0.0, evaluated=None, **dict.fromkeys(self.target.sums, 0.0))
        return move

    def watch(self, spent: float, total: float):
        """Count what all workers have spent in a step of an evaluation."""
        state = self.state if self.steers else self._watched
        before = state.get("evaluated") or (0.0, 0.0)
        state["evaluated"] = [before[0] + spent, before[1] + total]

    def forget(self):
        """A training step has come after an evaluation that nothing was steered by."""
        self._watched.clear()

    def spent(self) -> Optional[float]:
        """What the last evaluation has spent, else the last update; None: nothing was counted."""
        state = self.state if self.steers else self._watched
        spent, total = state.get("evaluated") or (state.get(name, 0.0) for name in self.target.sums)
        return spent / total if total else None

    def missed(self, updates: int) -> Optional[str]:
        """What to say where the target was missed, with what to change; None: it was not."""
        spent = self.spent()
        if self.value is None or spent is None or abs(spent / self.value - 1) <= TOLERANCE:
            return None
        if spent < self.value and not self.steers:  # a bound
            return None
        said = f"{self.target.flag} {self.value:g} was missed: it is {spent:.3f} after {updates} updates"
        if spent > self.value:
            return f"{said}. Train for more updates, at a higher learning rate, or with {self.target.advice}"
        return (
            f"{said}. Train for more updates, at a lower learning rate, or with a lower weight or gain in --target-args"
        )

    @torch.no_grad()
    def count(self, spent: Tensor, total: Tensor, move: float = 0.0) -> float:
        """Count a batch, one of every worker at a time.

        Args:
            spent, total: scalars
            move: how far thresholds are from their band, in this batch

        Returns:
            ``spent / total`` of all workers
        """
        total = total.to(spent.device).double()
        counts = torch.stack((spent.double(), total, move * total))
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(counts)
        for name, count in zip((*self.target.sums, "moves"), counts.tolist()):
            self.state[name] = self.state.get(name, 0.0) + count
        return float(counts[0] / counts[1])

"""A price that follows what a model spends, for losses with a target."""

from typing import Callable, Optional, Tuple

import torch
from torch import Tensor


def warmed_up(update: int, updates: int) -> float:
    """The share of a price that is due when it rises from 0 within ``updates`` updates."""
    return min(1.0, update / updates) if updates else 1.0


class Controller:
    """A proportional and integral controller; our own.

    What counts is the excess of the update before, over all its batches and workers. The state lies in that of the
    task, so that a resumed training goes on exactly.

    Args:
        task: a fairseq task
        name: of the state
        sums: names, in the state, of what was spent and of what that is a share
        excess: maps their ratio to how far it is above the target; None: nothing is steered
        rate: by how much the sum grows in an update with an excess of 1
    """

    def __init__(
        self, task, name: str, sums: Tuple[str, str], excess: Optional[Callable[[float], float]], rate: float
    ):
        self.task, self.name, self.sums, self.excess, self.rate = task, name, sums, excess, rate
        start = {"excess": 0.0, "sum": 0.0, "update": -1, **dict.fromkeys(sums, 0.0)}
        task.state.add_factory(name, lambda: dict(start))

    @property
    def state(self):
        return getattr(self.task.state, self.name)

    def advance(self, update: int) -> None:
        """Steer by the update before, where this is the first batch of another one. To be called before the price is
        asked for, so that all batches of an update have one price, be they several of a worker or one each of several.

        Args:
            update: how many updates there were before this one
        """
        state = self.state
        if state["update"] == update:
            return
        spent, total = (state[name] for name in self.sums)
        if total and self.excess is not None:
            state["excess"] = self.excess(spent / total)
            if state["sum"] * state["excess"] < 0:
                state["sum"] *= 0.9  # what grew on the way must not carry the ratio past the target
            state["sum"] += self.rate * state["excess"]
        state.update(update=update, **dict.fromkeys(self.sums, 0.0))

    @torch.no_grad()
    def count(self, spent: Tensor, total: Tensor) -> float:
        """Count a batch, one of every worker at a time.

        Args:
            spent, total: scalars

        Returns:
            ``spent / total`` of all workers
        """
        counts = torch.stack((spent.double(), total.double()))
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(counts)
        for name, count in zip(self.sums, counts.tolist()):
            self.state[name] += count
        return float(counts[0] / counts[1])

"""Which share of the tokens is computed, kept, halted and added at each depth of a stack."""

from collections import defaultdict
from typing import Any, Dict

from fairseq_adaptive.modules import LayerStack


class Shares:
    """What was decided in runs of a stack; of a stock one all tokens are computed at all depths.

    Args:
        stack: of a model

    Attributes:
        tokens: how many tokens there were, without a tape
    """

    def __init__(self, stack):
        self._stack, self.tokens, self._sums = stack, 0, defaultdict(float)

    def add(self, trace) -> None:
        """Count one run."""
        self.tokens += int(trace.tokens[:, : trace.tokens.size(1) - trace.tape_room].sum())
        self._sums["all"] += float(trace.tokens.sum())
        self._sums["updates"] += float(trace.updates.sum())
        self._sums["room"] += trace.tape_room
        for depth, there in enumerate(trace.counts()):
            self._sums["there", depth] += float(there)
        for depth, step in enumerate(trace.steps):
            for name in ("alive", "kept", "halted", "tape"):
                decided = getattr(step, name)
                self._sums[name, depth] += 0.0 if decided is None else float(decided.sum())

    def read(self) -> Dict[str, Any]:
        """
        Returns:
            ``mean_depth``: the mean number of updates of a token; and ``depths``, for each depth ``layer``, its number, and
            shares of the tokens there: ``alive``, those that were computed, ``kept``, those that a router let through,
            ``halted``, those that were done after it; and ``added``, tokens of a tape for each token of the sequences.
            None where no policy decides that
        """
        sums, stack, ours = self._sums, self._stack, isinstance(self._stack, LayerStack)
        depths = []
        for depth, layer in enumerate(stack.schedule if ours else range(len(stack))):
            there = sums["there", depth]
            routed, halts = ours and stack.router is not None, ours and stack.halting is not None
            row = {
                "layer": layer,
                "alive": sums["alive", depth] / there if there else 1.0,
                "kept": sums["kept", depth] / there if routed and there else None,
                "halted": sums["halted", depth] / there if halts and there else None,
                "added": sums["tape", depth] / self.tokens if sums["room"] else None,
            }
            depths.append(row)
        mean = sums["updates"] / sums["all"] if sums["all"] else float(len(stack))
        return {"mean_depth": mean, "depths": depths}

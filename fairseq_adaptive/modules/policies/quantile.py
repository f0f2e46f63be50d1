"""Q-exit: a token exits where its distribution over depths reaches a quantile (PALBERT, Balagansky and Gavrilov, 2022)."""

from typing import Optional

from fairseq_adaptive.modules.policies.base import LearnedHalting, check_threshold


class Distributed(LearnedHalting):
    """A learned rule with a distribution over depths: one trained model serves every quantile of it.

    Attributes:
        threshold: of the rule, in training
        quantile: at which a token exits in evaluation, in (0, 1]; None: by the rule's own threshold. A token that the rule
            ends has spent its probability, so a quantile above the threshold changes nothing
    """

    quantile: Optional[float] = None

    @property
    def halts_at(self) -> float:
        """The sum of probabilities at which a token halts at present."""
        if self.training or self.quantile is None:
            return self.threshold
        return min(self.threshold, self.quantile)

    def exit_at(self, quantile):
        self.quantile = check_threshold(quantile, "an exit quantile")

    def decided(self, trace):
        """As :meth:`Policy.decided`; of a training step by the probabilities that it found, at the quantile."""
        if not self.training or self.quantile is None:
            return super().decided(trace)
        found, halted, running = [], 0.0, trace.tokens
        for step in trace.steps:
            found.append(step.alive & running)
            if step.counts:
                halted = halted + step.probability.detach()
                running = running & (halted < self.quantile)
        return found

    def extra_repr(self):
        return f"threshold={self.threshold}" + ("" if self.quantile is None else f", quantile={self.quantile}")

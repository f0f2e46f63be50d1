"""Q-exit: a token exits where its distribution over depths reaches a quantile (PALBERT, Balagansky and Gavrilov, 2022)."""

from typing import Optional

from fairseq_adaptive.modules.policies.base import LearnedHalting, check_threshold

LEAST = 1e-6  # a quantile is above 0


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

    def turn(self, position, causal=False):
        """Exit at a quantile; of rules that do not halt in training it is another name of their threshold."""
        quantile = min(1.0, max(LEAST, position))
        self.exit_at(quantile)
        return {"exit_quantile": quantile, **({} if self.halts_in_training else {"halting_threshold": None})}

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

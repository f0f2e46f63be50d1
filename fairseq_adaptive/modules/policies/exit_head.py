"""Early exit where a learned head says that the word will not change: the classifier of CALM (Schuster et al., 2022)."""

from typing import Callable, Optional

import torch

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules.policies.base import LearnedHalting, Verdict, where_token
from fairseq_adaptive.modules.policies.confidence import ByConfidence
from fairseq_adaptive.modules.policies.registry import register_policy


@register_policy("exit_head")
class ExitHead(ByConfidence, LearnedHalting):
    """One linear layer and a sigmoid say after each depth how likely the word there is that of the last depth. A token halts
    when that reaches the threshold.

    In training nothing halts. The price is the binary cross-entropy of the head at all depths but the last; the head reads
    states without a gradient, so that the model learns nothing from it, and it can be trained with the model or after it.
    One head serves all depths, as in the public code (t5x, ``contrib/calm``), which balances the two labels in a batch; here
    they count as they come, so that what the head says is a probability.

    Args:
        dim: C, width of the states
        scores: maps states, ... x C, to logits, ... x V
        threshold: in (0, 1]
        bias: of the head at the start
        decay_over: of :class:`~fairseq_adaptive.modules.policies.confidence.ByConfidence`

    Raises:
        UsageError: for a stack that has no scores, and numbers that are impossible
    """

    weight = 1.0
    unsteered = "which never halts in training: set --halting-threshold"

    def __init__(
        self,
        dim: int,
        scores: Optional[Callable],
        threshold: float = 0.9,
        bias: float = 0.0,
        decay_over: Optional[int] = None,
    ):
        super().__init__(dim, bias)
        if scores is None:
            raise UsageError(
                "the halting rule exit_head learns from the word scores, which this stack has not (an encoder, or an "
                "adaptive softmax): choose saturation, or in translation --decoder-halting exit_head alone"
            )
        self.compare(threshold, decay_over)
        self.scores = scores

    def start(self, x):
        words = {"said": torch.zeros(x.shape[:-1], dtype=torch.long, device=x.device)} if self.training else {}
        return {**super().start(x), **words}

    def step(self, before, after, carry, running, last):
        confidence = self.probability(after.detach() if self.training else after)
        if self.training:
            with torch.no_grad():
                carry = {**carry, "said": self.scores(after).argmax(-1)}
        going_on = running & ~self.reached(confidence, carry)
        return Verdict(where_token(running, after, before), carry, going_on, confidence)

    def price(self, trace):
        """The mean over tokens and depths but the last of the cross-entropy with "the word is that of the last depth"; 0 in
        evaluation."""
        steps = [step for step in trace.steps if step.said is not None]
        if len(steps) < 2:
            return super().price(trace)
        total = 0.0
        for step in steps[:-1]:
            p = step.probability.clamp(1e-6, 1 - 1e-6)
            loss = torch.where(step.said == steps[-1].said, -p.log(), -(1 - p).log())
            total = total + (loss * trace.tokens).sum()
        return total / ((len(steps) - 1) * trace.tokens.sum().clamp_min(1))

    def lever(self, trace):
        """None: how deep tokens go is what ``--halting-threshold`` says."""

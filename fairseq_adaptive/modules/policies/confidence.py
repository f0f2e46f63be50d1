"""Early exit where the model is sure enough: saturation of the state, or the margin between the two best words."""

from typing import Callable, Optional

import torch
import torch.nn.functional as F

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules.policies.base import Halting, Verdict, check_threshold, upcast, where_token
from fairseq_adaptive.modules.policies.registry import register_policy


class ConfidenceExit(Halting):
    """Early exit at inference on a model that was trained without halting (Schuster et al., 2022, CALM, Section 3.3).

    A token halts when its confidence reaches the threshold. In training nothing halts.

    Args:
        threshold: in (0, 1]
        scores: maps states, ... x C, to logits, ... x V: the confidence is the margin between the two best
            probabilities. Without it the confidence is the saturation of the state: the cosine of the states before
            and after the layer

    Raises:
        UsageError: for a threshold outside (0, 1]
    """

    unsteered = "which is not trained: set --halting-threshold"
    no_quantile = "it compares each depth's confidence with --halting-threshold"

    def __init__(self, threshold: float = 0.99, scores=None):
        super().__init__()
        self.threshold = check_threshold(threshold)
        self.scores, self._words = scores, 0

    def step(self, before, after, carry, running, last):
        if self.scores is None:
            confidence = F.cosine_similarity(upcast(before), upcast(after), dim=-1)
        else:
            scores = self.scores(after)
            self._words = scores.size(-1)  # what a count of multiply-adds must know
            best = upcast(scores).softmax(-1).topk(2, dim=-1).values
            confidence = best[..., 0] - best[..., 1]
        stops = running & (confidence >= self.threshold)
        if self.training:
            stops = torch.zeros_like(stops)
        return Verdict(where_token(running, after, before), carry, running & ~stops, confidence)

    def turn(self, position, causal=False):
        """Set the threshold; most confidences are close to 1, and so are most positions."""
        self.threshold = max(1e-6, 1 - (1 - position) ** 4)
        return {"halting_threshold": self.threshold}

    def macs(self, counts):
        """Those of the word scores."""
        return counts.asked * counts.dim * self._words


@register_policy("saturation")
class Saturation(ConfidenceExit):
    """Exit where a layer hardly turns the state: the cosine of the states before and after it reaches the threshold.

    Args, errors: as in :class:`ConfidenceExit`
    """

    compares_states = True

    def __init__(self, threshold: float = 0.99):
        super().__init__(threshold)


@register_policy("margin")
class Margin(ConfidenceExit):
    """Exit where the best word is ahead of the second by the threshold.

    Args:
        scores: maps states, ... x C, to logits, ... x V
        threshold: in (0, 1]

    Raises:
        UsageError: for a stack that has no scores, and a threshold outside (0, 1]
    """

    def __init__(self, scores: Optional[Callable], threshold: float = 0.99):
        if scores is None:
            raise UsageError(
                "the halting rule margin asks the word scores, which this stack has not (an encoder, or "
                "an adaptive softmax): choose saturation, or in translation --decoder-halting margin "
                "alone"
            )
        super().__init__(threshold, scores)

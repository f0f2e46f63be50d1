"""Early exit where the model is sure enough: saturation of the state, or the margin between the two best words."""

from typing import Callable, Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules.policies.base import Halting, Verdict, check_threshold, upcast, where_token
from fairseq_adaptive.modules.policies.registry import register_policy


class ByConfidence:
    """What rules have in common that compare a confidence with a threshold; nothing halts by them in training.

    The threshold may fall over the sentence: early words, from which the later ones follow, must be surer (Schuster et al.,
    2022, CALM). At t tokens after the first it is 0.9 threshold + 0.1 threshold exp(-4 t / N), as the public code of CALM has
    it (t5x, ``contrib/calm``), where N is the longest that a sentence may get.

    Attributes:
        threshold: in (0, 1]
        decay_over: N; None: the threshold is the same everywhere
    """

    no_quantile = "it compares each depth's confidence with --halting-threshold"
    threshold: float
    decay_over: Optional[int] = None

    def compare(self, threshold: float, decay_over: Optional[int]) -> None:
        """Set both.

        Raises:
            UsageError: for a threshold outside (0, 1], and what is no number of tokens
        """
        whole = isinstance(decay_over, int) and not isinstance(decay_over, bool)
        if decay_over is not None and (not whole or decay_over < 1):
            raise UsageError(
                f"decay_over {decay_over!r}: it is how many tokens the longest sentences have, a whole number from 1"
            )
        self.threshold, self.decay_over = check_threshold(threshold), decay_over

    @property
    def reads_position(self) -> bool:
        return self.decay_over is not None

    def start(self, x):
        if self.decay_over is None:
            return {}
        return {"position": torch.zeros(x.shape[:-1], dtype=torch.long, device=x.device)}

    def reached(self, confidence: Tensor, carry) -> Tensor:
        """..., where a confidence reaches the threshold of its token; in training nowhere."""
        return torch.zeros_like(confidence, dtype=torch.bool) if self.training else confidence >= self.least(carry)

    def least(self, carry) -> Union[float, Tensor]:
        """The threshold, or ..., that of each token."""
        if self.decay_over is None:
            return self.threshold
        return self.threshold * (0.9 + 0.1 * (-4 / self.decay_over * carry["position"].double()).exp())

    def turn(self, position, causal=False):
        """Set the threshold; most confidences are close to 1, and so are most positions."""
        self.threshold = max(1e-6, 1 - (1 - position) ** 4)
        return {"halting_threshold": self.threshold}


class ConfidenceExit(ByConfidence, Halting):
    """Early exit at inference on a model that was trained without halting (Schuster et al., 2022, CALM, Section 3.3).

    A token halts when its confidence reaches the threshold. In training nothing halts.

    Args:
        threshold: in (0, 1]
        scores: maps states, ... x C, to logits, ... x V: the confidence is the margin between the two best
            probabilities. Without it the confidence is the saturation of the state: the cosine of the states before
            and after the layer
        decay_over: of :class:`ByConfidence`

    Raises:
        UsageError: for numbers that are impossible
    """

    unsteered = "which is not trained: set --halting-threshold"

    def __init__(self, threshold: float = 0.99, scores=None, decay_over: Optional[int] = None):
        super().__init__()
        self.compare(threshold, decay_over)
        self.scores, self._words = scores, 0

    def step(self, before, after, carry, running, last):
        if self.scores is None:
            confidence = F.cosine_similarity(upcast(before), upcast(after), dim=-1)
        else:
            scores = self.scores(after)
            self._words = scores.size(-1)  # what a count of multiply-adds must know
            best = upcast(scores).softmax(-1).topk(2, dim=-1).values
            confidence = best[..., 0] - best[..., 1]
        stops = self.reached(confidence, carry)
        return Verdict(where_token(running, after, before), carry, running & ~stops, confidence)

    def macs(self, counts):
        """Those of the word scores."""
        return counts.asked * counts.dim * self._words


@register_policy("saturation")
class Saturation(ConfidenceExit):
    """Exit where a layer hardly turns the state: the cosine of the states before and after it reaches the threshold.

    Args, errors: as in :class:`ConfidenceExit`
    """

    compares_states = True

    def __init__(self, threshold: float = 0.99, decay_over: Optional[int] = None):
        super().__init__(threshold, None, decay_over)


@register_policy("margin")
class Margin(ConfidenceExit):
    """Exit where the best word is ahead of the second by the threshold.

    Args:
        scores: maps states, ... x C, to logits, ... x V
        threshold: in (0, 1]
        decay_over: of :class:`ByConfidence`

    Raises:
        UsageError: for a stack that has no scores, and numbers that are impossible
    """

    def __init__(self, scores: Optional[Callable], threshold: float = 0.99, decay_over: Optional[int] = None):
        if scores is None:
            raise UsageError(
                "the halting rule margin asks the word scores, which this stack has not (an encoder, or "
                "an adaptive softmax): choose saturation, or in translation --decoder-halting margin "
                "alone"
            )
        super().__init__(threshold, scores, decay_over)

"""Early exit when the best word has not changed for some depths (after Zhou et al., *BERT Loses Patience*, 2020)."""

from typing import Callable, Optional

import torch

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules.policies.base import Halting, Verdict, where_token
from fairseq_adaptive.modules.policies.registry import register_policy


@register_policy("patience")
class Patience(Halting):
    """A token halts when ``depths_agreed`` depths in a row have said the same word as the one before them.

    At inference, on a model that was trained without halting; in training nothing halts. The paper asks classifiers of
    whole texts, one a layer; here it is the word scores of the stack, token by token.

    Args:
        scores: maps states, ... x C, to logits, ... x V
        depths_agreed: the paper's patience, 1 or more
        depths: N, of the stack

    Raises:
        UsageError: for a stack that has no scores, and a patience below 1
    """

    unsteered = "which is not trained: set --halting-args '{\"depths_agreed\": 2}'"
    no_quantile = "it counts depths that agree, --halting-args '{\"depths_agreed\": 2}'"

    def __init__(self, scores: Optional[Callable], depths_agreed: int = 2, depths: int = 1):
        super().__init__()
        if scores is None:
            raise UsageError(
                "the halting rule patience asks the word scores, which this stack has not (an encoder, or an adaptive "
                "softmax): choose saturation, or in translation --decoder-halting patience alone"
            )
        if not isinstance(depths_agreed, int) or depths_agreed < 1:
            raise UsageError(f"depths_agreed {depths_agreed!r} is impossible: give a whole number of 1 or more")
        self.scores, self.depths_agreed, self.depths, self._words = scores, depths_agreed, depths, 0

    def start(self, x):
        none = torch.zeros(x.shape[:-1], dtype=torch.long, device=x.device)
        return {"word": none - 1, "agreed": none}

    def step(self, before, after, carry, running, last):
        scores = self.scores(after)
        self._words, word = scores.size(-1), scores.argmax(-1)  # how many, a count of multiply-adds must know
        agreed = torch.where(word == carry["word"], carry["agreed"] + 1, 0)
        carry = {
            "word": torch.where(running, word, carry["word"]),
            "agreed": torch.where(running, agreed, carry["agreed"]),
        }
        stops = running & (agreed >= self.depths_agreed)
        if self.training:
            stops = torch.zeros_like(stops)
        probability = (carry["agreed"] / self.depths_agreed).clamp(max=1)
        return Verdict(where_token(running, after, before), carry, running & ~stops, probability)

    def turn(self, position, causal=False):
        """Set how many depths must agree: all of them is to the end."""
        self.depths_agreed = 1 + round(position * (self.depths - 1))
        return {"halting_args": {"depths_agreed": self.depths_agreed}}

    def macs(self, counts):
        """Those of the word scores."""
        return counts.asked * counts.dim * self._words

    def extra_repr(self):
        return f"depths_agreed={self.depths_agreed}"

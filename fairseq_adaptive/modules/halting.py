"""When a token stops: adaptive computation time, PonderNet, confidence.

A rule is asked after every depth. It sees the state of each token before and after the layer, and what it has carried
along; it answers with the new state and with who goes on. The same code serves dense runs, where halted tokens are
masked, and packed runs, where only running tokens are there. Sums and probabilities are float32 (float64 in a float64
model) whatever the precision of the states.
"""

import abc
from typing import Dict, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.ops.halting_update import halting_update

Carry = Dict[str, Tensor]


class Verdict(NamedTuple):
    """What a rule says after a depth; ``...`` is the shape of the tokens: T x B in a dense run, R in a packed one.

    Attributes:
        state: ... x C, what the next depth reads; that of halted tokens does not change
        carry: what the rule wants back after the next depth; every tensor starts with the shape of the tokens
        running: ..., true where the token goes on
        probability: ..., halting probability; ACT's is 0 where the token was not running
    """

    state: Tensor
    carry: Carry
    running: Tensor
    probability: Tensor


def upcast(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def where_token(mask: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """... x C, ``x`` where ``mask`` (...) is true, else ``y``; in the precision of ``y``."""
    return torch.where(mask.unsqueeze(-1), x.to(y.dtype), y)


class HaltingRule(nn.Module, abc.ABC):
    """A rule; the tensors of a run are passed in and out, a rule keeps nothing but its parameters.

    Attributes:
        weighs_depths: whether, at present, nothing halts and the probabilities of all depths weigh their states
    """

    weighs_depths = False

    def start(self, x: Tensor) -> Carry:
        """Return what to carry into the first depth.

        Args:
            x: ... x C, the states before the first depth
        """
        return {}

    @abc.abstractmethod
    def step(self, before: Tensor, after: Tensor, carry: Carry, running: Tensor, last: bool) -> Verdict:
        """Decide after one depth.

        Args:
            before, after: ... x C, states at the input and at the output of the layer
            carry: from :meth:`start` or the step before
            running: ..., true at tokens that have not halted; what the layer made of others is to be ignored
            last: whether this is the last depth
        """

    def output(self, state: Tensor, carry: Carry) -> Tensor:
        """Return the result of the run, ... x C, from the last states."""
        return state


class LearnedHalting(HaltingRule):
    """A rule with a halting unit: one linear layer and a sigmoid."""

    def __init__(self, dim: int, bias: float = 0.0):
        super().__init__()
        self.unit, self.bias = nn.Linear(dim, 1), bias
        self.reset_parameters()

    def reset_parameters(self):
        """For models that initialise all that is linear in their own way, after they have."""
        nn.init.normal_(self.unit.weight, std=0.02)
        nn.init.constant_(self.unit.bias, self.bias)

    def probability(self, state: Tensor) -> Tensor:
        """... x C -> ..., in float32 also where the model is in half precision."""
        with torch.autocast(state.device.type, enabled=False):
            state = upcast(state)
            weight, bias = self.unit.weight.to(state.dtype), self.unit.bias.to(state.dtype)
            return F.linear(state, weight, bias).squeeze(-1).sigmoid()


def check_threshold(threshold: float) -> float:
    """Return ``threshold``.

    Raises:
        UsageError: when it is not in (0, 1]
    """
    if not 0 < threshold <= 1:
        raise UsageError(f"a halting threshold of {threshold} is impossible: it must be above 0 and at most 1")
    return float(threshold)


class ACT(LearnedHalting):
    """Adaptive computation time in the form of ALBERT-ACT (Simoulin and Crabbe, 2021; after Graves, 2016).

    The halting unit reads the transformed state y. With p its output and h the sum so far, a token halts when h + p
    exceeds the threshold; its weight u is then the remainder r = 1 - h, and p before. The state becomes
    u y + (1 - u) x. The arithmetic is in ``ops/halting_update/naive.py``.

    Args:
        dim: C, width of the states
        threshold: 1 - epsilon of the paper, in (0, 1]
        bias: of the halting unit at the start; the higher, the earlier tokens halt

    Raises:
        UsageError: for a threshold outside (0, 1]
    """

    def __init__(self, dim: int, threshold: float = 0.99, bias: float = 0.0):
        super().__init__(dim, bias)
        self.threshold = check_threshold(threshold)

    def start(self, x):
        zeros = torch.zeros(x.shape[:-1], device=x.device, dtype=upcast(x[..., :0]).dtype)
        return {"halting": zeros, "remainders": zeros}

    def step(self, before, after, carry, running, last):
        weight, bias = self.unit.weight.squeeze(0), self.unit.bias
        update = halting_update(before, after, weight, bias, running=running, threshold=self.threshold, **carry)
        carry = {name: getattr(update, name) for name in carry}
        return Verdict(update.state, carry, update.running, update.probability)

    def extra_repr(self):
        return f"threshold={self.threshold}"


class UniversalACT(ACT):
    """Adaptive computation time in the form of the Universal Transformer (Dehghani et al., 2019, Appendix C).

    The halting unit reads the state before the layer. The state is not blended: a token's result is an accumulator
    o = u y + (1 - u) o of its own. A halted token keeps its last state, as the paper's text has it (the authors' code
    goes on to transform it).

    Args, errors: as in :class:`ACT`; the bias starts at 1
    """

    def __init__(self, dim: int, threshold: float = 0.99, bias: float = 1.0):
        super().__init__(dim, threshold, bias)

    def start(self, x):
        return {**super().start(x), "output": torch.zeros_like(x, dtype=upcast(x[..., :0]).dtype)}

    def output(self, state, carry):
        # what never ran, padding, keeps the state with which it came
        ran = (carry["halting"] > 0).unsqueeze(-1)
        return torch.where(ran, carry["output"], state).to(state.dtype)


class ConfidenceExit(HaltingRule):
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

    def __init__(self, threshold: float = 0.99, scores=None):
        super().__init__()
        self.threshold = check_threshold(threshold)
        self.scores = scores

    def step(self, before, after, carry, running, last):
        if self.scores is None:
            confidence = F.cosine_similarity(upcast(before), upcast(after), dim=-1)
        else:
            best = upcast(self.scores(after)).softmax(-1).topk(2, dim=-1).values
            confidence = best[..., 0] - best[..., 1]
        stops = running & (confidence >= self.threshold)
        if self.training:
            stops = torch.zeros_like(stops)
        return Verdict(where_token(running, after, before), carry, running & ~stops, confidence)

"""When a token stops: adaptive computation time (Graves, 2016), as in ALBERT-ACT and the Universal Transformer."""

import torch

from fairseq_adaptive.modules.layers.known import is_plain
from fairseq_adaptive.modules.layers.prepacked_linear import LINEARS
from fairseq_adaptive.modules.policies.base import Verdict, check_threshold, upcast, where_token
from fairseq_adaptive.modules.policies.quantile import Distributed
from fairseq_adaptive.modules.policies.registry import register_policy
from fairseq_adaptive.modules.tracing import is_traced
from fairseq_adaptive.ops.halting_update import halting_update, naive


@register_policy("act")
class ACT(Distributed):
    """Adaptive computation time in the form of ALBERT-ACT (Simoulin and Crabbe, 2021; after Graves, 2016).

    The halting unit reads the transformed state y. With p its output and h the sum so far, a token halts when h + p
    exceeds the threshold; its weight u is then the remainder r = 1 - h, and p before. The state becomes
    u y + (1 - u) x. The arithmetic is in ``ops/halting_update/naive.py``.

    At an exit quantile a token halts when h + p exceeds the quantile, and its weight there is the remainder: the mean over
    depths under the distribution that is cut off at the exit.

    Args:
        dim: C, width of the states
        threshold: 1 - epsilon of the paper, in (0, 1]
        bias: of the halting unit at the start; the higher, the earlier tokens halt

    Raises:
        UsageError: for a threshold outside (0, 1]
    """

    weight, halts_in_training = 0.01, True

    def __init__(self, dim: int, threshold: float = 0.99, bias: float = 0.0):
        super().__init__(dim, bias)
        self.threshold = check_threshold(threshold)

    def start(self, x):
        zeros = torch.zeros(x.shape[:-1], device=x.device, dtype=upcast(x[..., :0]).dtype)
        return {"halting": zeros, "remainders": zeros}

    def step(self, before, after, carry, running, last):
        if is_plain(self.unit, LINEARS) and not is_traced():
            weight, bias = self.unit.weight.squeeze(0), self.unit.bias
            update = halting_update(before, after, weight, bias, running=running, threshold=self.halts_at, **carry)
        else:
            p = self.probability(before if "output" in carry else where_token(running, after, before))
            update = naive.update(before, after, p, running=running, threshold=self.halts_at, **carry)
        carry = {name: getattr(update, name) for name in carry}
        return Verdict(update.state, carry, update.running, update.probability)

    def price(self, trace):
        """The mean of n + r over the tokens (Graves, 2016)."""
        return trace.ponder_cost() / trace.tokens.sum().clamp_min(1)

    def lever(self, trace):
        """n + r is flat where it has collapsed, the logits of p are not."""
        return trace.reluctance() / trace.tokens.sum().clamp_min(1)


@register_policy("ut_act")
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

    def output(self, state, carry, finished=None):
        result = carry["output"]
        if finished is not None:
            rest = (1 - carry["halting"]).masked_fill(finished, 0)
            result = result + rest.unsqueeze(-1) * state
        # what never ran, padding, keeps the state with which it came
        return torch.where((carry["halting"] > 0).unsqueeze(-1), result, state).to(state.dtype)

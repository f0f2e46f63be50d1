"""Halting rules by name."""

from typing import Callable, Optional

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules.halting import ACT, ConfidenceExit, HaltingRule, UniversalACT
from fairseq_adaptive.modules.pondernet import PonderNet

RULES = ("none", "act", "ut_act", "pondernet", "saturation", "margin")


def build_halting(
    name: str, dim: int, threshold: Optional[float] = None, scores: Optional[Callable] = None
) -> Optional[HaltingRule]:
    """Return the halting rule of a name in ``RULES``; None for ``none``.

    Args:
        dim: C, width of the states
        threshold: in (0, 1]; default that of the rule
        scores: for ``margin``, maps states, ... x C, to logits, ... x V

    Raises:
        UsageError: for an unknown name or an impossible threshold, and for ``margin`` without scores
    """
    if name not in RULES:
        raise UsageError(f"unknown halting rule {name!r}: choose one of {', '.join(RULES)}")
    if name == "none":
        return None
    given = {} if threshold is None else {"threshold": threshold}
    if name == "saturation":
        return ConfidenceExit(**given)
    if name == "margin":
        if scores is None:
            raise UsageError("the halting rule margin asks the word scores, which this stack has not (an encoder, or "
                             "an adaptive softmax): choose saturation, or in translation --decoder-halting margin alone")
        return ConfidenceExit(**given, scores=scores)
    return {"act": ACT, "ut_act": UniversalACT, "pondernet": PonderNet}[name](dim, **given)

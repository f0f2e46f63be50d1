"""What can be turned on a trained model, so that it spends more or less."""

import math
from typing import Callable, List, NamedTuple, Optional, Tuple

import torch
from torch import nn

from fairseq_adaptive.criterions.decisions import decisions
from fairseq_adaptive.modules.policies import Distributed, Policy

STEPS = tuple(round(0.1 * step, 1) for step in range(1, 11))


class Dial(NamedTuple):
    """A number in (0, 1] that some policies of a model have.

    Attributes:
        name: as flags and papers call it
        policies: which have it
        turn: sets it on a policy
        help: what more of it does
        values: for a curve
    """

    name: str
    policies: List[Policy]
    turn: Callable[[Policy, float], None]
    help: str
    values: Tuple[float, ...] = STEPS


def dials_of(model: nn.Module) -> List[Dial]:
    """The dials of a model; one that policies of several stacks have turns all of them."""
    every = decisions(model)
    policies = [each.policy for each in every]
    ahead = {each.policy for each in every if each.side == "decoder"}  # whose later tokens are not there
    kinds = (
        ("exit quantile", lambda each: isinstance(each, Distributed), _quantile, "the higher, the deeper tokens go"),
        ("halting threshold", _by_confidence, _threshold, "the higher, the surer a token must be to halt"),
        (
            "keeping threshold",
            lambda each: each.movable and not hasattr(each, "bound"),
            _keeping,
            "the higher, the more tokens are skimmed; 0.5 is as trained",
        ),
        (
            "capacity",
            lambda each: hasattr(each, "capacity") and each not in ahead,
            _capacity,
            "share of the tokens that a layer computes",
        ),
        (
            "router threshold",
            lambda each: hasattr(each, "bound") and each in ahead,
            _bound,
            "the higher, the fewer tokens go on",
        ),
    )
    found = []
    for name, has, turn, text in kinds:
        having = [each for each in policies if has(each)]
        values = STEPS if name not in ("keeping threshold", "router threshold") else STEPS[:-1]  # 1 is out of reach
        if having:
            found.append(Dial(name, having, turn, text, values))
    return found


class Turned:
    """A context in which a dial is turned; afterwards all is as it was trained.

    Args:
        dial: of :func:`dials_of`, or None
        value: in (0, 1], or None: as trained
    """

    def __init__(self, dial: Optional[Dial], value: Optional[float]):
        self._dial, self._value = (dial, value) if dial is not None and value is not None else (None, None)

    def __enter__(self):
        self._before = [(each, _state(each)) for each in (self._dial.policies if self._dial else ())]
        for each, _ in self._before:
            self._dial.turn(each, self._value)

    def __exit__(self, *_):
        for each, before in self._before:
            for name, value in before.items():
                setattr(each, name, value)


def _state(policy):
    return {
        name: getattr(policy, name)
        for name in ("quantile", "threshold", "shift", "capacity", "bound")
        if hasattr(policy, name)
    }


def _by_confidence(policy) -> bool:
    return policy.kind == "halting" and hasattr(policy, "threshold") and not isinstance(policy, Distributed)


def _quantile(policy, value):
    policy.exit_at(value)


def _threshold(policy, value):
    policy.threshold = value


def _capacity(policy, value):
    policy.capacity, policy.shift = value, None


def _keeping(policy, value):
    policy.move(-_logit(value))  # from where training has left it


def _bound(policy, value):
    policy.bound = _logit(value)


def _logit(value: float) -> float:
    return (
        float(torch.logit(torch.tensor(value, dtype=torch.float64)))
        if 0 < value < 1
        else math.copysign(40.0, value - 0.5)
    )

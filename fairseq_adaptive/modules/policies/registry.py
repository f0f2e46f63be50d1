"""Policies by name."""

import inspect
from typing import Optional, Tuple

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules.policies.base import Halting, Place, Policy, Reader, Router

KINDS = {"router": Router, "halting": Halting, "reader": Reader}
_WORDS = {"router": "router", "halting": "halting rule", "reader": "reader"}
_REGISTERED = {kind: {} for kind in KINDS}


def register_policy(name: str):
    """Make a class a choice of ``--router``, ``--halting`` or ``--reader``, whichever it is, of every family::

        @register_policy("every_other")
        class EveryOther(Router, nn.Module):
            ...

    The arguments of its constructor are those of a :class:`Place` (``dim``, ``depths``, ``scores``, ``heads``), where
    it has any of them, and what ``--router-args`` and its like give by name.

    Raises:
        UsageError: for a class that is no policy, and a name that is taken
    """

    def register(cls):
        kind = next((kind for kind, base in KINDS.items() if isinstance(cls, type) and issubclass(cls, base)), None)
        if kind is None:
            raise UsageError(f"{cls!r} is no policy: derive it from Router, Halting or Reader")
        taken = _REGISTERED[kind].get(name)
        again = taken is not None and (taken.__module__, taken.__qualname__) == (cls.__module__, cls.__qualname__)
        if name == "none" or (taken is not None and not again):
            raise UsageError(f"there is a {_WORDS[kind]} {name!r} already: choose another name")
        _REGISTERED[kind][name] = cls
        cls.policy_name = name
        return cls

    return register


def policies(kind: str) -> Tuple[str, ...]:
    """The names of a kind (``router``, ``halting``, ``reader``), ``none`` first."""
    return ("none", *_REGISTERED[kind])


def check_name(kind: str, name: Optional[str]) -> str:
    """Return the name of a policy, ``none`` for None.

    Raises:
        UsageError: when it is unknown
    """
    name = "none" if name is None else str(name)
    if name not in policies(kind):
        raise UsageError(f"unknown {_WORDS[kind]} {name!r}: choose one of {', '.join(policies(kind))}")
    return name


def build_policy(kind: str, name: Optional[str], place: Place, **options) -> Optional[Policy]:
    """Return the policy of a name, None for ``none`` and None.

    Args:
        kind: ``router``, ``halting`` or ``reader``
        place: the stack that it is for
        options: arguments of its constructor

    Raises:
        UsageError: for a name that is unknown, or options that the policy does not have
    """
    name = check_name(kind, name)
    if name == "none":
        if options:
            raise UsageError(f"--{kind}-args is given without --{kind}: add it, or leave out {', '.join(options)}")
        return None
    cls = _REGISTERED[kind][name]
    known = [each.name for each in inspect.signature(cls).parameters.values() if each.kind != each.VAR_POSITIONAL]
    given = {field: value for field, value in place._asdict().items() if field in known}
    own = [each for each in known if each not in Place._fields]
    for option in options:
        if option not in own:
            raise UsageError(f"the {_WORDS[kind]} {name} has no argument {option!r}: it has {', '.join(own) or 'none'}")
    return cls(**given, **options)

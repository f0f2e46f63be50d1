"""Whether a module is what a fast path takes it for.

A fast path reads weights and calls nothing, so it must not be taken where a module does more than its class is known for:
another class (a subclass, a parametrization, an adapter such as LoRA in the place of a linear map), hooks, or a method of
its own. Then the plain path is taken, which calls the modules.
"""

import functools
import logging
from typing import Iterator, Optional, Tuple

from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils.module_tracker import ModuleTracker

logger = logging.getLogger(__name__)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_EVERYWHERE = [getattr(torch_module, f"_global{name}") for name in HOOKS]  # torch changes them in place
_KNOWN = set()


def known(cls):
    """Let fast paths know a class; a subclass is unknown until it says so for itself."""
    _KNOWN.add(cls)
    return cls


def same(function):
    """Let fast paths know a function that may take the place of a module's ``forward``, or be a global hook: it computes
    the same."""
    function.computes_the_same = True
    return function


def _watches(hook) -> bool:
    """Whether a global hook changes nothing, as those of torch's FlopCounterMode: what it counts must be what runs."""
    return isinstance(getattr(hook, "__self__", None), ModuleTracker) or getattr(hook, "computes_the_same", False)


def any_global_hooks() -> bool:
    """Whether there are hooks of all modules."""
    return any(_EVERYWHERE)


def hooked(*modules: nn.Module) -> bool:
    """Whether somebody sees what any of these modules gets or gives."""
    return any_global_hooks() or any(getattr(module, name) for module in modules for name in HOOKS)


def change(module: nn.Module, types: Tuple = (), called: bool = False, ignored: Tuple = ()) -> Optional[str]:
    """What makes a module other than fast paths know it, in words, or None; its children are not looked at.

    Args:
        types: which classes are known beside those of :func:`known`
        called: the module is called all the same, so that its hooks are
        ignored: names of methods that may be its own
    """
    cls = type(module)
    if cls not in types and cls not in _KNOWN:
        return f"{cls.__name__} is none of the known classes"
    if not called and any(_EVERYWHERE) and not all(_watches(hook) for hooks in _EVERYWHERE for hook in hooks.values()):
        return "there are global hooks"
    if not called and any(getattr(module, name) for name in HOOKS):
        return f"{cls.__name__} has hooks"
    for name, value in vars(module).items():
        if name not in ignored and callable(value) and callable(getattr(cls, name, None)):
            function = value.func if isinstance(value, functools.partial) else value
            if not getattr(function, "computes_the_same", False):
                return f"{cls.__name__} has a {name} of its own"
    return None


def is_plain(module: nn.Module, types: Tuple = ()) -> bool:
    """Whether nothing of a module is changed, see :func:`change`; its children are not looked at."""
    return change(module, types) is None


def first_change(modules: Iterator[nn.Module], types: Tuple = ()) -> Optional[str]:
    """The first :func:`change` of several modules; None: there is none."""
    return next(filter(None, (change(module, types) for module in modules)), None)


@functools.lru_cache(maxsize=1000)
def say_once(path: str, why: str):
    """Log that a fast path is not taken, and why."""
    logger.info("%s: the plain path is taken, since %s", path, why)

"""The states after each depth of a dense run, for losses that read them."""

import contextlib
from contextvars import ContextVar
from types import MappingProxyType
from typing import Iterator, List, Mapping, Optional

from torch import Tensor, nn

# of the stacks whose states are wanted in this thread, the lists that take them
_WANTED: ContextVar[Mapping[nn.Module, List[Tensor]]] = ContextVar("wanted states", default=MappingProxyType({}))


def taker(stack: nn.Module) -> Optional[List[Tensor]]:
    """The list that takes the states of a stack in this call; None where nobody wants them."""
    return _WANTED.get().get(stack)


@contextlib.contextmanager
def every_state(stack: nn.Module) -> Iterator[List[Tensor]]:
    """Collect the states after each of the N depths in the dense run of a stack within the ``with`` block.

    Those of a depth that is left out are the states before it. They are in the layout that the stack returns, have
    gradients, and are kept by nobody else. A packed run gives none.

    Yields:
        a list, to be read when the block is over
    """
    states: List[Tensor] = []
    token = _WANTED.set({**_WANTED.get(), stack: states})
    try:
        yield states
    finally:
        _WANTED.reset(token)

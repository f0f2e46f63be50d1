"""A stack as a sequence of layers, as ``nn.ModuleList`` is for code that is written for fairseq's own encoders."""

import copy
from typing import Iterable

from torch import nn

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules.stack.contract import check_layer

TAKES = ("depth", "residual")


def part(stack, depths: range):
    """Some depths of a stack, with its layers and not copies of them.

    Returns:
        a stack of the same class, which runs; where policies, ``--init admin`` or ``--depth-lora-rank`` know the depths by
        their numbers an ``nn.ModuleList``, one entry a depth
    """
    layers = [stack[depth] for depth in depths]
    if why_fixed(stack) is not None or not layers:
        return nn.ModuleList(layers)
    numbers = list(dict.fromkeys(stack.schedule[depth] for depth in depths))
    new = copy.copy(stack)
    new._modules = {str(place): stack.layer(number) for place, number in enumerate(numbers)}
    new.unique_layers = len(numbers)
    new._set_schedule([numbers.index(stack.schedule[depth]) for depth in depths])
    return new


def append(stack, layers: Iterable[nn.Module]) -> None:
    """Let further depths follow, each served by a layer of the stack's, or by a new one with parameters of its own.

    Raises:
        UsageError: for a stack whose depths are fixed, and a layer that is called otherwise than those of the stack
    """
    layers = list(layers)
    why = why_fixed(stack)
    if why is not None:
        raise UsageError(f"no layer can be appended: {why}; build the model with as many layers as it is to have")
    own = [stack.layer(number) for number in range(stack.unique_layers)]
    schedule = list(stack.schedule)
    for layer in layers:
        if layer not in own:
            check_layer(layer, None, TAKES if stack.pass_depth else (), "be appended")
            own.append(layer)
        schedule.append(own.index(layer))
    for number in range(stack.unique_layers, len(own)):
        stack.add_module(str(number), own[number])
    stack.unique_layers = len(own)
    stack._set_schedule(schedule)


def why_fixed(stack):
    """What knows the depths of a stack by their numbers, in words, or None."""
    if stack.adaptive:
        return "its policies decide at the depths that they were made for"
    if stack.residual is not None:
        return "--init admin has a scale for each depth"
    if stack.lora_rank:
        return "--depth-lora-rank has differences for each depth"
    return None if stack.resizable else f"a {type(stack).__name__} is made for its depths"

"""What a layer must have to run under policies, and to be packed."""

import inspect
from typing import Optional

from torch import nn

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules.layers.known import change, first_change, say_once

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj", "num_heads", "head_dim")


def check_layer(
    layer: nn.Module, attention: Optional[str], needs, to: str = "run under a router or a halting rule"
) -> None:
    """Refuse a layer that a stack would run wrongly, or not at all.

    Args:
        layer: of a :class:`~fairseq_adaptive.modules.LayerStack`
        attention: the name of the attention in the block that attends, which policies ask for; None: there are none
        needs: arguments that its call must take
        to: what the layer cannot do, for the message

    Raises:
        UsageError: with the name of its class and what it lacks
    """
    name = type(layer).__name__
    advice = "a layer that maps states and a padding mask to states needs nothing of that: put it into a ForeignStack"
    if attention is not None and not hasattr(layer, "attends"):
        raise UsageError(
            f"{name} cannot {to}: it does not say with ``attends`` which block of it has keys and values; {advice}"
        )
    block = None if attention is None else layer.attends
    lacks = (
        [] if block is None else [each for each in ("before", "keys_and_values", attention) if not hasattr(block, each)]
    )
    if not lacks and block is not None and attention == "self_attn":
        lacks = [f"{attention}.{each}" for each in PROJECTIONS if not hasattr(block.self_attn, each)]
    arguments = inspect.signature(type(layer).forward).parameters.values()
    if not any(each.kind == each.VAR_KEYWORD for each in arguments):
        given = {each.name for each in arguments}
        lacks += [f"the argument {each} of forward" for each in needs if each not in given]
    if lacks:
        raise UsageError(f"{name} cannot {to}: it lacks {', '.join(lacks)}; {advice}")


def changed_layers(stack) -> Optional[str]:
    """What makes layers or attention of a stack other than packed runs know them, in words, or None.

    Raises:
        UsageError: where that leaves no way to give tokens the keys and values that they are to read
    """
    why = None
    for layer in map(stack.layer, range(stack.unique_layers)):
        block = getattr(layer, "attends", None)
        replaced = (getattr(block, name, None) for name in (stack.attention, "encoder_attn"))
        why = (
            why
            or change(layer, called=True)
            or (block is not None and change(block, called=True))
            or first_change(each for each in replaced if each is not None)
        )
    why = why or None
    if why is not None and stack.adaptive:
        say_once("packed runs", why)
        if stack.kv != "recompute":
            raise UsageError(
                f"{stack.kv} keeps the keys and values of attention, but here {why}: choose recompute or active"
            )
        if stack.merges:
            raise UsageError(
                f"--router {stack.router.policy_name} adds the sizes of tokens to the scores of attention, but here {why}"
            )
    return why

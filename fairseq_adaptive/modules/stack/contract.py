"""What a layer must have to run under policies."""

import inspect
from typing import Optional

from torch import nn

from fairseq_adaptive.errors import UsageError

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

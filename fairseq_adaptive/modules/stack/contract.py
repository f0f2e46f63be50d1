"""What a layer must have to run under policies."""

import inspect

from torch import nn

from fairseq_adaptive.errors import UsageError

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj", "num_heads", "head_dim")


def check_layer(layer: nn.Module, attention: str, needs) -> None:
    """Refuse a layer that a policy would run wrongly, or not at all.

    Args:
        layer: of a :class:`~fairseq_adaptive.modules.LayerStack`
        attention: the name of the attention in the block that attends
        needs: arguments that its call must take

    Raises:
        UsageError: with the name of its class and what it lacks
    """
    name = type(layer).__name__
    advice = "a layer that maps states and a padding mask to states needs nothing of that: put it into a ForeignStack"
    if not hasattr(layer, "attends"):
        raise UsageError(
            f"{name} cannot run under a router or a halting rule: it does not say with ``attends`` which block "
            f"of it has keys and values; {advice}"
        )
    block = layer.attends
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
        raise UsageError(f"{name} cannot run under a router or a halting rule: it lacks {', '.join(lacks)}; {advice}")

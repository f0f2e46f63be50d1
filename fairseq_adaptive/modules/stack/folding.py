"""Weights of N layers, read into a stack of M."""

from typing import Dict

import torch
from torch import Tensor

from fairseq_adaptive.errors import UsageError


def fold(stack, state_dict: Dict[str, Tensor], prefix: str):
    """Make the weights of an unshared stack of N layers those of a stack, in place, where that loses nothing.

    Weights of M layers are left as they are.

    Args:
        stack: of N depths
        state_dict: weights of a whole model
        prefix: name of the stack in it, ``encoder.layers.``

    Raises:
        UsageError: when the number of layers is neither M nor N, or N layers are there but those that this stack
            shares differ
    """
    by_layer: Dict[int, Dict[str, Tensor]] = {}
    for name, tensor in state_dict.items():
        number, _, rest = name[len(prefix) :].partition(".")
        if name.startswith(prefix) and number.isdigit():
            by_layer.setdefault(int(number), {})[rest] = tensor
    if len(by_layer) in (0, stack.unique_layers):
        return
    ours = f"{stack.unique_layers} unique layers at {len(stack)} depths"
    if len(by_layer) != len(stack):
        raise UsageError(f"{prefix[:-1]} has {len(by_layer)} layers in the checkpoint, this model has {ours}")
    for depth, index in enumerate(stack.schedule):
        first = stack.schedule.index(index)
        for rest, tensor in by_layer[depth].items():
            if not torch.equal(tensor, by_layer[first][rest]):
                raise UsageError(
                    f"{prefix[:-1]} has {len(by_layer)} layers in the checkpoint and this model has {ours}, "
                    f"but layers {first} and {depth}, which it shares, differ: "
                    f"use {len(by_layer)} unique layers, or a checkpoint of {stack.unique_layers} layers"
                )
    for depth, weights in by_layer.items():
        for rest in weights:
            del state_dict[f"{prefix}{depth}.{rest}"]
    for index in range(stack.unique_layers):
        for rest, tensor in by_layer[stack.schedule.index(index)].items():
            state_dict[f"{prefix}{index}.{rest}"] = tensor

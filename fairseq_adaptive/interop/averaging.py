"""The mean of several checkpoints of one training run (Vaswani et al., 2017, Section 6.1)."""

import os
import re
from collections import defaultdict
from typing import Any, Dict, List, Optional, Sequence

import torch

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.interop.checkpoint import load_checkpoint, model_options
from fairseq_adaptive.progress import progress

_NAMES = {"epoch": re.compile(r"checkpoint(\d+)\.pt"), "update": re.compile(r"checkpoint_\d+_(\d+)\.pt")}

# flags that change what a model computes, but neither names nor shapes of its weights: with layer sharing, models of
# any depth and strategy look alike
_SAME_OPTIONS = ("layer_sharing", "activation_fn") + tuple(
    f"{side}_{name}" for side in ("encoder", "decoder") for name in ("layers", "attention_heads", "normalize_before")
)


def last_checkpoints(folder, count: int, by: str = "epoch", upper_bound: Optional[int] = None) -> List[str]:
    """Return the paths of the last ``count`` checkpoints in a folder, the last one first.

    Args:
        folder: a ``--save-dir``
        count: how many
        by: ``epoch`` (``checkpoint12.pt``) or ``update`` (``checkpoint_3_5000.pt``, of ``--save-interval-updates``)
        upper_bound: leave out later epochs or updates

    Raises:
        UsageError: when the folder is missing or has fewer of them
    """
    if count < 1:
        raise UsageError(f"the number of checkpoints to average must be at least 1, not {count}")
    if not os.path.isdir(folder):
        raise UsageError(f"{folder} is no folder: to take the last checkpoints, name the --save-dir of the training")
    found = {}
    for name in os.listdir(folder):
        match = _NAMES[by].fullmatch(name)
        if match and (upper_bound is None or int(match[1]) <= upper_bound):
            found[int(match[1])] = os.path.join(folder, name)
    if len(found) < count:
        bound = "" if upper_bound is None else f" up to {by} {upper_bound}"
        raise UsageError(f"{folder} has {len(found)} {by} checkpoints{bound}, not {count}: ask for fewer")
    return [found[number] for number in sorted(found, reverse=True)[:count]]


def average_checkpoints(paths: Sequence) -> Dict[str, Any]:
    """Return a checkpoint whose weights are the mean of those of others.

    Sums are taken in float64; the mean of half-precision weights is float32, so that averaging loses nothing. Integers
    and booleans (counters, flags) have no mean: they are those of the first checkpoint, as is all that is not a weight.
    The state of the optimizer is left out, it belongs to other weights. Weights that are one tensor in all checkpoints
    are one tensor in the result.

    Args:
        paths: checkpoint files, the last one of the training run first

    Raises:
        UsageError: when a file cannot be used or does not fit the first one
    """
    if not paths:
        raise UsageError("there is no checkpoint to average")
    if len({os.path.realpath(path) for path in paths}) < len(paths):
        raise UsageError("a checkpoint is named twice: it would count twice in the mean")
    first, sums, places = None, {}, defaultdict(tuple)
    for path in progress(paths, "checkpoints"):
        state = load_checkpoint(path)
        if first is None:
            first = state
            first.pop("last_optimizer_state", None)
        difference = _difference(first, state)
        if difference:
            raise UsageError(f"{path} cannot be averaged with {paths[0]}: {difference}")
        for name, tensor in state["model"].items():
            places[name] += (_place(tensor),)
            if tensor.is_floating_point():
                sums[name] = tensor.double() + sums.get(name, 0)  # never in place: the tensor may have other names
    shared = {}
    for name, tensor in first["model"].items():
        if name in sums:
            dtype = torch.float32 if tensor.dtype.itemsize < 4 else tensor.dtype
            tensor = (sums.pop(name) / len(paths)).to(dtype)
        first["model"][name] = shared.setdefault(places[name], tensor)
    return first


def _place(tensor):
    return tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.dtype, tensor.shape, tensor.stride()


def _difference(first, state) -> Optional[str]:
    """What keeps two checkpoints from being averaged, or None."""
    weights, others = first["model"], state["model"]
    odd = sorted(set(weights) ^ set(others))
    if odd:
        return f"only one of them has {', '.join(odd[:3])}{' ...' if len(odd) > 3 else ''}"
    for name, tensor in weights.items():
        if tensor.shape != others[name].shape:
            return f"{name} has the shapes {tuple(others[name].shape)} and {tuple(tensor.shape)}"
    ours, theirs = model_options(first), model_options(state)
    for option in _SAME_OPTIONS:
        if ours.get(option) != theirs.get(option):
            flag = "--" + option.replace("_", "-")
            return f"they were trained with {flag} {theirs.get(option)} and {ours.get(option)}"
    return None

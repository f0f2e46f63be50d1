"""fairseq's checkpoint files: read safely, written whole or not at all, never over another file."""

import argparse
import os
from typing import Any, Dict, Mapping, Optional

import torch
from fairseq import checkpoint_utils
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY
from omegaconf import OmegaConf
from torch import Tensor

from fairseq_adaptive.compat.plain import make_plain
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.files import require_new, whole_file  # noqa: F401  require_new was here once


def load_checkpoint(path) -> Dict[str, Any]:
    """Read a checkpoint to the CPU as what can be saved again: ``cfg`` is a dict, as fairseq's trainer writes it.

    Checkpoints of older fairseq versions are brought up to date. Tensors that share memory in the file share it here.

    Raises:
        UsageError: when the file is missing, damaged, unsafe or no fairseq checkpoint, or its weights are not finite
    """
    path = _existing(path)
    try:
        state = checkpoint_utils.load_checkpoint_to_cpu(path)
        state["cfg"] = OmegaConf.to_container(state["cfg"], resolve=True, enum_to_str=True)
        state["model"].items()
        model_options(state)
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:
        raise UsageError(f"{path} is no fairseq checkpoint: it lacks the weights or the configuration") from error
    require_finite(state["model"], path)
    return state


def _existing(path):
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise UsageError(f"checkpoint {path} is {'a folder: name a file in it' if os.path.isdir(path) else 'missing'}")
    return path


def require_finite(weights: Mapping[str, Any], where) -> None:
    """
    Args:
        weights: tensors by name
        where: what they were read from, for the message

    Raises:
        UsageError: when one holds NaN or infinity: what is computed with it means nothing
    """
    for name, tensor in weights.items():
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and not tensor.isfinite().all():
            raise UsageError(f"{name} in {where} holds NaN or infinity: the training failed, or the file is damaged")


def load_trained(path, overrides: Optional[Mapping[str, Any]] = None):
    """Load a checkpoint for use, with what it says of its training.

    Args:
        path: the file
        overrides: flags in place of those of the training

    Returns:
        the model, fairseq's configuration, and the task

    Raises:
        UsageError: when the file is missing or damaged, or weights are not finite
    """
    path = _existing(path)
    (model,), cfg, task = checkpoint_utils.load_model_ensemble_and_task([path], arg_overrides=dict(overrides or {}))
    require_finite(model.state_dict(), path)
    return model, cfg, task


def load_model(path, overrides: Optional[Mapping[str, Any]] = None):
    """The model and the task of :func:`load_trained`."""
    model, _, task = load_trained(path, overrides)
    return model, task


def model_options(state: Dict[str, Any]) -> Dict[str, Any]:
    """The flags of the model in a checkpoint, a new dict; ``_name`` is the architecture, which has filled what was not
    given (``fairseq-hydra-train`` writes down no more than it was told)."""
    model = state["cfg"]["model"]
    options = dict(vars(model) if isinstance(model, argparse.Namespace) else model)
    name = options["_name"] = options.get("_name") or options["arch"]
    if getattr(getattr(ARCH_MODEL_REGISTRY.get(name), "__dataclass", None), "none_is_not_given", False):
        given = argparse.Namespace(**{flag: value for flag, value in options.items() if value is not None})
        ARCH_CONFIG_REGISTRY[name](given)
        options.update(vars(given))
    return options


def given_options(state: Dict[str, Any]) -> Dict[str, Any]:
    """:func:`model_options` without those that are None, for readers who take what is not there for not given."""
    return {name: value for name, value in model_options(state).items() if value is not None}


def save_checkpoint(state: Dict[str, Any], path):
    """Write a checkpoint to a file beside ``path``, then give it its name. What it holds is made plain, so that the safe
    loader of any fairseq reads it.

    Raises:
        UsageError: when ``path`` exists, the file cannot be written, or ``state`` holds what cannot be loaded safely
    """
    plain = make_plain(state)
    with whole_file(path) as part:
        save_tensors(plain, part)


def save_tensors(content, path) -> None:
    """``torch.save``, but where it cannot write, it says why: given a name, torch writes past Python and its errors."""
    with open(path, "wb") as file:
        torch.save(content, file)

"""Folders of ``save_pretrained``: what a model is, its weights, and the words that it reads.

``config.json`` has the flags of the model and the task, as fairseq takes them, and for plain torch what the encoder is
made of. No path of the machine that wrote it is in it.
"""

import contextlib
import importlib.util
import json
import os
import shutil
import tempfile
from dataclasses import dataclass, field
from typing import Any, Dict, Iterator, List, Optional, Tuple

import torch
from torch import Tensor, nn

from fairseq_adaptive import __version__
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.files import read_json, whole_file, whole_folder

CONFIG, WEIGHTS, MARK, FORMAT = "config.json", "model.safetensors", "fairseq_adaptive", 1
# of tokenizers, which lie beside the dictionary; those of translations are named by options
TOKENIZERS = ("vocab.txt", "vocab.json", "merges.txt", "spiece.model", "tokenizer_config.json")


@dataclass
class Origin:
    """What a model was read from.

    Attributes:
        architecture, task: names
        flags: of ``model``, ``task`` and ``criterion``, as fairseq had them
        files: further files that the model needs, by the name that they get in a folder
        options: of ``from_pretrained``, that the model was read with
    """

    architecture: str
    task: str
    flags: Dict[str, Dict[str, Any]]
    files: Dict[str, str] = field(default_factory=dict)
    options: Dict[str, Any] = field(default_factory=dict)


def has_fairseq() -> bool:
    """Whether fairseq is installed."""
    try:
        return importlib.util.find_spec("fairseq") is not None
    except ImportError:
        return False


def needs_fairseq(what: str) -> None:
    """
    Raises:
        UsageError: where fairseq is not installed
    """
    if not has_fairseq():
        raise UsageError(
            f"{what} is read with fairseq, which is not installed here: without it folders of save_pretrained load, of "
            "classifiers (transkimmer, albert_act) and of the encoders of translation models (shared_transformer)"
        )


def tokenizer_files(where) -> Dict[str, str]:
    """The files of a tokenizer, a folder or a SentencePiece model, by the names that they get."""
    if os.path.isfile(where):
        return {"spiece.model": os.fspath(where)}
    paths = {name: os.path.join(where, name) for name in TOKENIZERS}
    return {name: path for name, path in paths.items() if os.path.isfile(path)}


def read_config(folder) -> Dict[str, Any]:
    """``config.json`` of a folder of :func:`write_folder`.

    Raises:
        UsageError: where it is missing, of something else, or of a later version
    """
    path = os.path.join(folder, CONFIG)
    if not os.path.isfile(path):
        raise UsageError(f"there is no {path}: name a folder of save_pretrained, or a checkpoint file")
    config = read_json(path)
    if MARK not in config:
        raise UsageError(f"{path} was not written by save_pretrained of fairseq_adaptive")
    if config.get("format") != FORMAT:
        raise UsageError(
            f"{path} has the format {config.get('format')!r:.20}, and this version reads {FORMAT}: update it"
        )
    parts = {"architecture": str, "task": str, "flags": dict, "tied": dict, "options": dict}
    for name, kind in parts.items():
        if not isinstance(config.get(name), kind):
            raise UsageError(f"{path} is damaged: {name} is {config.get(name)!r:.40}")
    return config


def read_weights(folder, config: Dict[str, Any]) -> Dict[str, Tensor]:
    """The weights of a folder, tied ones under all of their names, on the CPU.

    Raises:
        UsageError: where they are missing or damaged, or safetensors is not installed
    """
    path = os.path.join(folder, WEIGHTS)
    if not os.path.isfile(path):
        raise UsageError(f"there is no {path}")
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise UsageError(f"to read {path}, install safetensors: pip install safetensors") from error
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise UsageError(f"{path} is damaged: {error}") from error
    for name, other in config["tied"].items():
        if other not in weights:
            raise UsageError(f"{path} lacks {other}, which {name} is tied to")
        weights[name] = weights[other]
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UsageError(f"{name} in {path} holds NaN or infinity: the training failed, or the file is damaged")
    return weights


def write_folder(folder, origin: Origin, model: nn.Module, task, half: bool = False) -> None:
    """Write a model as a new folder.

    Args:
        folder: must not exist
        origin: what it was read from
        model, task: fairseq's, or the plain ones
        half: store float16, for weights that have been rounded to it

    Raises:
        UsageError: where it exists or cannot be written, or half precision would change a weight
    """
    from fairseq_adaptive.hub.plain import describe, named_state, verify

    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise UsageError("to write model.safetensors, install safetensors: pip install safetensors") from error
    state = named_state(model)
    weights, tied = _untied(state)
    plain, reason = describe(model, origin)
    config = {
        MARK: __version__,
        "format": FORMAT,
        "architecture": origin.architecture,
        "task": origin.task,
        "flags": origin.flags,
        "options": origin.options,
        "tied": tied,
        "plain": plain,
        "needs_fairseq": reason,
    }
    with whole_folder(folder) as made:
        with open(os.path.join(made, CONFIG), "w", encoding="utf-8") as file:
            json.dump(config, file, indent=1, ensure_ascii=False, default=str)
        stored = {name: each.half() if half and each.is_floating_point() else each for name, each in weights.items()}
        save_file(stored, os.path.join(made, WEIGHTS), metadata={"format": "pt"})
        for name, dictionary in dictionaries(origin, task).items():
            _write_words(dictionary, os.path.join(made, name))
        for name, path in origin.files.items():
            shutil.copyfile(path, os.path.join(made, name))
        written = read_weights(made, read_config(made))
        if not all(torch.equal(each.cpu(), written[name].to(each.dtype)) for name, each in state.items()):
            raise UsageError(f"cannot write {folder}: what was written is not what was to be written")
        if plain is not None and getattr(model, "described", None) is None:
            verify(made, model)


def dictionaries(origin: Origin, task) -> Dict[str, Any]:
    """The dictionaries of a task by the names of their files."""
    if origin.task == "sentence_prediction":
        found = {"input0/dict.txt": task.source_dictionary}
        return found if task.cfg.regression_target else {**found, "label/dict.txt": task.label_dictionary}
    if origin.task == "translation":
        sides = (task.cfg.source_lang, task.source_dictionary), (task.cfg.target_lang, task.target_dictionary)
        return {f"dict.{language}.txt": dictionary for language, dictionary in sides}
    words = getattr(task, "dictionary", None) or task.source_dictionary
    return {} if words is None else {"dict.txt": words}


def _write_words(dictionary, path):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    counts = getattr(dictionary, "count", [1] * len(dictionary))
    with whole_file(path) as part, open(part, "w", encoding="utf-8", newline="\n") as file:
        for word, count in list(zip(dictionary.symbols, counts))[dictionary.nspecial :]:
            file.write(f"{word} {count}\n")


def _untied(state: Dict[str, Tensor]) -> Tuple[Dict[str, Tensor], Dict[str, str]]:
    """Tensors, each once, and of further names which of them they stand for."""
    weights, tied, seen = {}, {}, {}
    for name, tensor in state.items():
        key = tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype
        if tensor.numel() and key in seen:
            tied[name] = seen[key]
            continue
        seen[key] = name
        weights[name] = tensor.detach().cpu().contiguous().clone()
    return weights, tied


def origin_of(
    state: Dict[str, Any], options: Optional[Dict[str, Any]] = None, files: Optional[Dict[str, str]] = None
) -> Origin:
    """The :class:`Origin` of a fairseq checkpoint, without what its model has no flag for, and without paths.

    Args:
        state: of ``load_checkpoint``
        options, files: of the origin
    """
    from fairseq_adaptive.interop.checkpoint import model_options

    model, task = model_options(state), _section(state["cfg"].get("task"))
    task = {
        name: "" if name == "data" else value for name, value in task.items() if name == "data" or not _is_path(value)
    }
    known = {*_flags_of(model["_name"]), *task, "_name", "arch"}
    model = {name: value for name, value in model.items() if name in known and not _is_path(value)}
    criterion = _section(state["cfg"].get("criterion"))
    criterion = {name: value for name, value in criterion.items() if not _is_path(value)}
    return Origin(
        str(model["_name"]),
        str(task.get("_name")),
        {"model": model, "task": task, "criterion": criterion},
        dict(files or {}),
        dict(options or {}),
    )


def _section(found) -> Dict[str, Any]:
    found = dict(found if isinstance(found, dict) else vars(found or object))
    return {name: value for name, value in found.items() if isinstance(name, str) and not name.startswith("__")}


def _is_path(value) -> bool:
    return isinstance(value, str) and os.sep in value and not value.lstrip().startswith("{")


def _flags_of(architecture: str) -> List[str]:
    from argparse import SUPPRESS, ArgumentParser

    from fairseq.models import ARCH_MODEL_REGISTRY

    parser = ArgumentParser(argument_default=SUPPRESS, add_help=False)
    ARCH_MODEL_REGISTRY[architecture].add_args(parser)
    return [each.dest for each in parser._actions]


def as_plain_origin(folder, config: Dict[str, Any]) -> Origin:
    """The :class:`Origin` of a model that was read without fairseq."""
    files = {
        **tokenizer_files(folder),
        **({"codes": path} if os.path.isfile(path := os.path.join(folder, "codes")) else {}),
    }
    return Origin(config["architecture"], config["task"], config["flags"], files, config["options"])


@contextlib.contextmanager
def as_checkpoint(source) -> Iterator[Tuple[str, Optional[str], Dict[str, Any]]]:
    """A checkpoint file of what :func:`write_folder` wrote, for as long as this is open; a file is taken as it is.

    Yields:
        the file, the folder that has its dictionaries and tokenizer or None, and the options that it was saved with
    """
    source = os.fspath(source)
    if not os.path.isdir(source):
        yield source, None, {}
        return
    config = read_config(source)
    from argparse import Namespace

    from fairseq.dataclass.configs import FairseqConfig
    from fairseq.models import ARCH_MODEL_REGISTRY, MODEL_DATACLASS_REGISTRY
    from omegaconf import OmegaConf

    from fairseq_adaptive.interop.checkpoint import save_checkpoint

    flags = config["flags"]
    if config["architecture"] not in ARCH_MODEL_REGISTRY:
        raise UsageError(f"{source} has a model of the architecture {config['architecture']}, which is unknown here")
    cfg = OmegaConf.to_container(OmegaConf.structured(FairseqConfig()), enum_to_str=True)
    model = dict(flags.get("model", {}))
    cfg["model"] = model if model.get("_name") in MODEL_DATACLASS_REGISTRY else Namespace(**model)
    cfg["task"], cfg["criterion"] = dict(flags.get("task", {})), dict(flags.get("criterion", {}))
    if "data" in cfg["task"]:
        cfg["task"]["data"] = source
    state = {
        "args": None,
        "cfg": cfg,
        "model": read_weights(source, config),
        "optimizer_history": [{"criterion_name": "", "optimizer_name": "", "lr_scheduler_state": {}, "num_updates": 0}],
        "task_state": {},
        "extra_state": {"train_iterator": {"epoch": 1, "iterations_in_epoch": 0}},
        "last_optimizer_state": None,
    }
    with tempfile.TemporaryDirectory() as scratch:
        path = os.path.join(scratch, "checkpoint.pt")
        save_checkpoint(state, path)
        yield path, source, config["options"]

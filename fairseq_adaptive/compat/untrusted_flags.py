"""A patch of what fairseq does with the flags in a checkpoint: by them, nothing of the environment or the disk gets in.

fairseq builds the model, and often the task and the criterion, from the flags in the file. Safe unpickling does not
make these strings safe: ``${oc.env:SECRET}`` reads the environment, and many a flag names a file to open.
docs/checkpoints.md lists what is done with each.
"""

import contextlib
import json
import logging
import os
import re
from argparse import Namespace
from contextvars import ContextVar
from typing import Any, NamedTuple

from fairseq_adaptive.compat.literals import NotLiteral, shorten
from fairseq_adaptive.compat.overrides import make_room
from fairseq_adaptive.errors import UsageError

logger = logging.getLogger(__name__)

TRUST = "FAIRSEQ_ADAPTIVE_TRUST"

# Flags are forgotten, and this is their value then, where a checkpoint is whole without the file that they name: its
# weights are later than those that a training started from, ...
START_WEIGHTS = {
    "encoder_embed_path": None,
    "decoder_embed_path": None,
    "embed_path": None,
    "load_pretrained_encoder_from": None,
    "load_pretrained_decoder_from": None,
    "load_pretrained_aux_decoder_from": None,
    "seq2seq_path": "",
}
# ... and no criterion needs its teacher, a file to write to or a language model to give its loss.
CRITERION_FILES = {
    "distill_from": None,
    "save_predictions": None,
    "wer_kenlm_model": None,
    "wer_lexicon": None,
    "wer_args": None,
}
# Flags of a task that name files outside of its data, without which it would have other dictionaries: refused.
TASK_FILES = (
    "lang_dict",
    "source_dict",
    "target_dict",
    "fixed_dictionary",
    "sampling_weights_from_file",
    "lang_to_offline_shard_ratio",
)
DATA_FILES = ("data", "config_yaml", "multitask_config_yaml")  # a folder, and files in it: refused elsewhere

_NODE = re.compile(r"\$\{[\w.\[\]-]+\}")  # another flag; a resolver has a colon, what nests has more braces
_NAME = re.compile(r"[\w-]+")


def is_trusted(path) -> bool:
    """Whether the user vouches for a checkpoint: ``FAIRSEQ_ADAPTIVE_TRUST`` names it, or several with ``:`` between."""
    trusted = [each for each in os.environ.get(TRUST, "").split(os.pathsep) if each]
    return os.path.realpath(path) in map(os.path.realpath, trusted)


def _refused(path, flag, value, reason, advice=None):
    advice = advice or f"If you made this file, or trust who did: {TRUST}={path}"
    return UsageError(f"checkpoint {path} is refused: its flag {flag} is {shorten(value)}, {reason}. {advice}")


class _Flag(NamedTuple):
    name: tuple
    value: Any
    holder: dict
    key: Any
    kind: str  # of what holds it: config, namespace or json

    def __str__(self):
        return ".".join(self.name)


def _flags(node, name=(), kind="config"):
    """Yield every flag below a node, containers too."""
    if isinstance(node, Namespace):
        node, kind = vars(node), "namespace"
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in list(items):
        flag = _Flag((*name, str(key)), value, node, key, kind)
        yield flag
        if isinstance(value, (dict, Namespace, list, tuple, set, frozenset)):
            yield from _flags(value, flag.name, kind)
        elif isinstance(value, str) and flag.name[-1].endswith("_args"):
            with contextlib.suppress(ValueError):  # who reads it tells what is wrong
                parsed = json.loads(value)
                if isinstance(parsed, dict):
                    yield from _flags(parsed, flag.name, "json")


def _check_interpolations(path, tree, root=(), nodes=True) -> bool:
    """Whether some are given as other flags, where ``nodes`` are allowed; what reads anything else is refused."""
    found = False
    for flag in _flags(tree, root):
        for text in (flag.key, flag.value):
            if isinstance(text, str) and "${" in text:
                found = True
                if not nodes or flag.kind != "config" or "${" in _NODE.sub("", text):
                    raise _refused(
                        path,
                        flag,
                        text,
                        "which is looked up outside of the file, such as in the environment",
                        "Write the value itself into the file",
                    )
    return found


def _check_names(path, args, root):
    """The names of components are names: hydra opens files called ``bpe/NAME.yaml``, wherever NAME leads to."""
    from fairseq.registry import REGISTRIES

    for key in ("task", "arch", *REGISTRIES):
        value = getattr(args, key, None)
        if value is not None and not (isinstance(value, str) and _NAME.fullmatch(value)):
            raise _refused(
                path,
                ".".join((*root, key)),
                value,
                f"but the name of a registered {key} consists of letters, digits, - and _",
            )


def _forget_files(path, tree, root, overrides):
    for flag in _flags(tree, root):
        name = flag.name[-1]
        if not flag.value or name not in START_WEIGHTS and name not in CRITERION_FILES:
            continue
        if flag.kind == "json":
            raise _refused(path, flag, flag.value, "a file that only the checkpoint names")
        flag.holder[flag.key] = {**START_WEIGHTS, **CRITERION_FILES}[name]
        if name in CRITERION_FILES and name not in overrides:
            logger.warning(
                f"{path}: its {flag}={shorten(flag.value)} is left out: no file is opened because a "
                f"checkpoint names it. To use it, give --{name.replace('_', '-')} on the command line"
            )


def _leaves_its_folder(name, value):
    if name == "data":  # of some tasks it is a file
        return any(os.path.isfile(each) for each in str(value).split(os.pathsep))
    return os.path.basename(str(value)) != value


def _refuse_files(path, tree, root, overrides, makes_task):
    for flag in _flags(tree, root):
        name, nested = flag.name[-1], flag.name[0] != "task" and len(flag.name) > 2  # w2v_args: a task in a model
        if not flag.value or not (name in TASK_FILES or name in DATA_FILES and _leaves_its_folder(name, flag.value)):
            continue
        if nested or makes_task and flag.name[0] in ("task", "args") and name not in overrides:
            raise _refused(
                path,
                flag,
                flag.value,
                "a file that only the checkpoint names",
                f"Name it yourself: --{name.replace('_', '-')}, or arg_overrides in Python",
            )


class _Building:
    """One call that builds models from checkpoints: the files that it was given, and the flags in the last of them."""

    def __init__(self, paths, makes_task, path):
        self.paths, self.makes_task, self.path, self.flags = paths, makes_task, path, []

    def opens(self, path):
        """Refuse to open what is not one of the files, unless the one that names it is trusted."""
        path = os.fspath(path)
        if path not in self.paths and not is_trusted(self.path):
            names = [flag for flag in self.flags if isinstance(flag.value, str) and flag.value]
            flag = next((flag for flag in names if path.endswith(flag.value)), "of a name that it composes")
            raise _refused(self.path, flag, path, "another checkpoint, which would become a part of its model")


_building = ContextVar("building", default=None)
_reading = ContextVar("reading", default=("checkpoint", None))  # path, and what its user gives instead of its flags


def _check(path, state, overrides, building):
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    checked = []
    if isinstance(state.get("args"), Namespace):  # as fairseq stored flags before it knew hydra
        checked.append((state["args"], ("args",)))
        _check_interpolations(path, *checked[-1])
    cfg = state.get("cfg")
    if OmegaConf.is_dict(cfg):
        tree = OmegaConf.to_container(cfg, resolve=False)
        if _check_interpolations(path, tree):
            try:
                tree = OmegaConf.to_container(cfg, resolve=True)
            except OmegaConfBaseException as error:
                raise UsageError(
                    f"checkpoint {path} has a flag that is given as another one, which it lacks: "
                    f"{' '.join(str(error).split())}"
                ) from None
            _check_interpolations(path, tree, nodes=False)  # put together from harmless pieces
        checked.append((tree, ()))
    for tree, root in checked:
        for args, name in [(tree, root), *((flag.value, flag.name) for flag in _flags(tree, root))]:
            if isinstance(args, Namespace) and (len(name) > 1 or name == ("args",)):
                _check_names(path, args, name)
        _refuse_files(path, tree, root, overrides, building is not None and building.makes_task)
        _forget_files(path, tree, root, overrides)
        if building:
            building.flags += _flags(tree, root)
    if OmegaConf.is_dict(cfg):
        state["cfg"] = OmegaConf.create(tree, flags={"allow_objects": True})


def guard_flags():
    """No checkpoint reads the environment, or a file that its user has not named, through its flags.

    fairseq looks flags up in the environment (``${oc.env:HOME}``), and opens the pretrained weights, dictionaries,
    configurations and files to write to that they name. Here they are taken as they stand, files that can be missed are
    forgotten, and the rest is refused.
    """
    from fairseq import checkpoint_utils

    stock_read, stock_upgrade = checkpoint_utils.load_checkpoint_to_cpu, checkpoint_utils._upgrade_state_dict
    stock_build = checkpoint_utils.load_model_ensemble_and_task

    def load_checkpoint_to_cpu(path, arg_overrides=None, *args, **kwargs):
        if _building.get():
            _building.get().opens(path)
        with _set(_reading, (path, arg_overrides)):
            return stock_read(path, None, *args, **kwargs)

    def _upgrade_state_dict(state):  # the first that fairseq does with flags; what the user gives comes after the check
        (path, overrides), building = _reading.get(), _building.get()
        if building and os.fspath(path) in building.paths:
            building.path, building.flags = path, []
        if not is_trusted(path):
            try:
                _check(path, state, overrides or {}, building)
            except RecursionError:
                raise UsageError(f"checkpoint {path} is refused: its flags are nested too deeply") from None
        for key, value in (overrides or {}).items():
            if state.get("args") is not None:
                setattr(state["args"], key, value)
        if overrides and state.get("cfg") is not None:
            make_room(path, state["cfg"], overrides)
            checkpoint_utils.overwrite_args_by_name(state["cfg"], overrides)
        return stock_upgrade(state)

    def load_model_ensemble_and_task(
        filenames, arg_overrides=None, task=None, strict=True, suffix="", num_shards=1, state=None
    ):
        if _building.get():
            _building.get().opens(filenames[0])
        paths = {
            checkpoint_utils.get_maybe_sharded_checkpoint_filename(name, suffix, shard, num_shards)
            for name in filenames
            for shard in range(num_shards)
        }
        building = _Building(paths, task is None, filenames[0])
        if state is not None and not is_trusted(filenames[0]):  # it was read before, to look at it
            building.path, building.flags = filenames[0], []
            _check(filenames[0], state, arg_overrides or {}, building)
        with _set(_building, building):
            try:
                return stock_build(filenames, arg_overrides, task, strict, suffix, num_shards, state)
            except NotLiteral as error:
                flag = next((flag for flag in building.flags if flag.value == error.expression), None)
                if flag is None:
                    raise
                raise UsageError(
                    f"checkpoint {building.path} is refused: its flag {flag} is "
                    f"{shorten(error.expression)}, but {error.wanted}"
                ) from None

    checkpoint_utils.load_checkpoint_to_cpu = load_checkpoint_to_cpu
    checkpoint_utils._upgrade_state_dict = _upgrade_state_dict
    checkpoint_utils.load_model_ensemble_and_task = load_model_ensemble_and_task


@contextlib.contextmanager
def _set(variable, value):
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)

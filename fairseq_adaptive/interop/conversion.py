"""Other people's model folders to a checkpoint and a dictionary of fairseq: what all formats have in common."""

import importlib
import os
from typing import Any, Callable, Dict, Iterable, Mapping, Sequence, Tuple, Union

import torch
from fairseq import options
from fairseq.data import Dictionary
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from omegaconf import OmegaConf
from torch import Tensor

from fairseq_adaptive.compat.damage import damage
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.files import read_json, whole_folder
from fairseq_adaptive.interop.checkpoint import require_finite, save_checkpoint
from fairseq_adaptive.interop.verifying import DEFINED, require_readable, require_same
from fairseq_adaptive.progress import progress
from fairseq_adaptive.ranges import Range

# each module has add_args(parser) for the flags of its own, convert(args) -> (state of a checkpoint, Dictionary), and
# outputs(args, folder), which yields (what computes, what the converted model in the folder computes of a short text, what
# the original does, as definitions/ has it), one for each kind of output;
# one that can go back has convert_back(args), which writes args.output from the checkpoint args.input; one that reads
# checkpoints alone has only write(args), which says what it wrote
FORMATS = {
    "albert_act": "fairseq_adaptive.interop.albert_act",
    "bert": "fairseq_adaptive.interop.bert",
    "fairseq": "fairseq_adaptive.interop.sharing",
    "roberta": "fairseq_adaptive.interop.bert",
    "transfo_xl": "fairseq_adaptive.interop.transfo_xl",
    "transkimmer": "fairseq_adaptive.interop.bert",
}


def find_format(name: str):
    """Return the module that converts a format, a key of ``FORMATS``."""
    return importlib.import_module(FORMATS[name])


def read_folder(folder) -> Tuple[Dict[str, Any], Dict[str, Tensor]]:
    """Return ``config.json`` and the weights of ``model.safetensors`` or ``pytorch_model.bin``, on the CPU in float32.

    Raises:
        UsageError: when one is missing, damaged or unsafe
    """
    path = os.path.join(folder, "config.json")
    if not os.path.isfile(path):
        raise UsageError(f"there is no {path}: --input is a folder with config.json and the weights")
    config = read_json(path)
    path = os.path.join(folder, "model.safetensors")
    if os.path.isfile(path):
        weights = _read_safetensors(path)
    else:
        path = os.path.join(folder, "pytorch_model.bin")
        if not os.path.isfile(path):
            raise UsageError(f"there is neither model.safetensors nor pytorch_model.bin in {folder}")
        weights = _read_bin(path)
    return config, {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in weights.items()}


def _read_safetensors(path):
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise UsageError(f"to read {path}, install safetensors: pip install 'fairseq_adaptive[hf]'") from error
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UsageError(f"{path} is damaged: {error}") from error


def _read_bin(path):
    found = damage(path)
    if found is not None:
        raise UsageError(f"{path} is damaged: {found}")
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch lets through whatever its unpickler stumbles over
        raise UsageError(f"{path} is damaged or holds more than tensors: save the state_dict() alone") from error
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UsageError(f"{path} holds no plain state_dict(): save that alone")
    return weights


def check_numbers(config: Dict[str, Any], ranges: Mapping[str, Range], optional: Mapping[str, Range] = {}) -> None:
    """
    Args:
        config: ``config.json``
        ranges: of the numbers that it must have
        optional: of those that it may have

    Raises:
        UsageError: for one that is missing, no number, or out of its range
    """
    lacking = [name for name in ranges if name not in config]
    if lacking:
        raise UsageError(f"config.json lacks {', '.join(lacking)}: is it that of such a model?")
    for name, within in {**ranges, **optional}.items():
        if name in config:
            within.check(config[name], f"{name} in config.json")


def check_heads(width: int, heads: int) -> None:
    """
    Raises:
        UsageError: when attention heads do not divide the width
    """
    if width % heads:
        raise UsageError(
            f"config.json says that {heads} attention heads share a width of {width}, which cannot be "
            "divided among them"
        )


class Weights:
    """Weights by name, each taken once; one that is missing or has another shape is the user's error.

    Args:
        tensors: as read
        prefix: of the body's names, which some files have and others have not
    """

    def __init__(self, tensors: Dict[str, Tensor], prefix: str = ""):
        self.tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        self.left, self._taken = set(self.tensors), []

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def take(self, names: Union[str, Sequence[str]], *shape: int) -> Tensor:
        """Return a tensor of the given shape; of several names, which all stand for one tensor, the first there is.

        Raises:
            UsageError: when it is missing or of another shape
        """
        names = [names] if isinstance(names, str) else names
        name = next((name for name in names if name in self.tensors), None)
        if name is None:
            raise UsageError(f"the weights lack {' or '.join(names)}, which config.json asks for")
        tensor = self.tensors[name]
        if not tensor.is_floating_point():
            raise UsageError(
                f"{name} holds numbers of type {str(tensor.dtype).removeprefix('torch.')}: save weights as "
                "floating-point numbers"
            )
        require_finite({name: tensor}, "the weights")
        if tuple(tensor.shape) != shape:
            raise UsageError(f"{name} has the shape {tuple(tensor.shape)}, but by config.json it should be {shape}")
        self.left.discard(name)
        self._taken.append(tensor)
        return tensor

    def require_used(self, unused: Sequence[str]) -> None:
        """
        Args:
            unused: how names begin of what the converted model does without

        Raises:
            UsageError: when anything else was not taken, unless it equals something that was, as tied weights do
        """
        for name in sorted(self.left):
            tensor = self.tensors[name]
            if not name.startswith(tuple(unused)) and not any(
                tensor.shape == each.shape and torch.equal(tensor, each) for each in self._taken
            ):
                raise UsageError(
                    f"the weights hold {name}, which the converted model has no place for: it would be another "
                    "model; remove it, or convert a model without it"
                )


def new_state(flags: Sequence[str], weights: Dict[str, Tensor]) -> Dict[str, Any]:
    """Return a checkpoint as fairseq-train would have written with these flags, without optimizer and progress."""
    parser = options.get_training_parser()
    cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, [".", *map(str, flags)]))
    names = {"criterion_name": "CrossEntropyCriterion", "optimizer_name": "FairseqAdam"}  # fairseq asks for some
    return {
        "args": None,
        "cfg": OmegaConf.to_container(cfg, resolve=True, enum_to_str=True),
        "model": weights,
        "optimizer_history": [{**names, "lr_scheduler_state": {}, "num_updates": 0}],
        "task_state": {},
        "extra_state": {"train_iterator": {"epoch": 1, "iterations_in_epoch": 0}},
        "last_optimizer_state": None,
    }


def write_folder(
    state: Dict[str, Any],
    dictionary: Dictionary,
    output,
    outputs: Callable[[str], Iterable[Tuple[str, Tensor, Tensor]]],
) -> None:
    """Write ``checkpoint.pt`` and ``dict.txt`` to a new folder, both or none, once fairseq has read them back and the model
    computes what the original does.

    Args:
        state: of the checkpoint
        dictionary: of the model
        output: the new folder
        outputs: the folder, before it has its name, to a description, what the model in it computes, and what the
            original does, as often as there is something to compare

    Raises:
        UsageError: when ``output`` exists or its parent does not, or what was written is no model or another one
    """
    with whole_folder(output) as made:
        path = os.path.join(made, "checkpoint.pt")
        dictionary.save(os.path.join(made, "dict.txt"))
        save_checkpoint(state, path)
        require_readable(path, state)
        require_outputs(outputs(made))


@torch.no_grad()
def require_outputs(outputs: Iterable[Tuple[str, Tensor, Tensor]]) -> None:
    """
    Args:
        outputs: what computes something, what it found, and what was expected

    Raises:
        UsageError: when one is not finite, or they differ by more than rounding
    """
    for what, found, expected in progress(outputs, "comparisons with the original"):
        require_finite({"the output": found}, what)
        require_same(found, expected, what, DEFINED)

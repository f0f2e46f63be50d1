"""The state of a training as what torch's safe loader reads, and back."""

import argparse
import collections
import enum
import io
import pathlib
from typing import Any, List, Tuple

import numpy as np
import torch

from fairseq_adaptive.errors import UsageError

ARRAYS = "numpy_arrays"  # where a checkpoint lists the places of tensors that were NumPy arrays
_NUMBERS = "biufc"  # NumPy's kinds of dtype
_Place = Tuple[Any, ...]
_EXACT = {str: str.__str__, int: int.__int__, float: float.__float__}  # to the class itself from those that extend it


def make_plain(state: Any) -> Any:
    """Return a copy of ``state`` that :func:`torch.load` reads with ``weights_only=True``.

    Every NumPy number becomes Python's, every NumPy array of numbers a tensor, in every container. Containers and values
    of other classes become those that they extend (a ``defaultdict`` a ``dict``, a named tuple a ``tuple``), a ``deque``
    a list, a ``frozenset`` a set, a member of an ``Enum`` its value, a path a string. Tensors are taken over, not copied.
    ``state`` is left as it is: meters of the running training are in it.

    A dict keeps a list of its arrays under ``numpy_arrays``, from which :func:`restore_arrays` makes them again.

    Raises:
        UsageError: when something in it has no such form; the message says where it is
    """
    arrays: List[_Place] = []
    plain = _plain(state, (), arrays, ())
    if isinstance(plain, dict) and arrays:
        plain[ARRAYS] = arrays
    return plain


def restore_arrays(state: dict, saved_as: type = ()) -> None:
    """Make NumPy arrays of the tensors that were arrays when :func:`make_plain` got them, in place.

    Meters go on as they would have without the resume: fairseq computes BLEU from sums that are arrays.

    Args:
        state: a checkpoint
        saved_as: a class of placeholders whose ``array`` stands for them, too

    Raises:
        UsageError: when the list of places is none
    """
    try:
        places = set(state.pop(ARRAYS, ()))
    except TypeError:
        raise UsageError(f"the checkpoint's {ARRAYS} is no list of places: it was written by other code") from None

    def restore(value, place):
        if isinstance(value, saved_as):
            return value.array
        if torch.is_tensor(value):
            return value.numpy() if place in places else value
        if isinstance(value, dict):
            for key in value:
                value[key] = restore(value[key], (*place, key))
        elif isinstance(value, list):
            value[:] = [restore(each, (*place, index)) for index, each in enumerate(value)]
        elif type(value) is tuple:
            return tuple(restore(each, (*place, index)) for index, each in enumerate(value))
        elif isinstance(value, _objects()):
            restore(vars(value), place)
        return value

    restore(state, ())


def _objects():
    from fairseq.data import Dictionary

    return argparse.Namespace, Dictionary


def _plain(value, place, arrays, above):
    """``above``: the ids of the containers around ``value``."""
    import omegaconf

    if value is None or type(value) in (bool, float, str):
        return value
    if type(value) is int and value.bit_length() < 2000:  # the safe loader reads no longer ones
        return value
    if type(value) in (torch.Tensor, torch.nn.Parameter) and (not vars(value) or _loads(vars(value))):
        return value
    if isinstance(value, np.generic):
        return _number(value, place)
    if isinstance(value, np.ndarray):
        return _tensor(value, place, arrays)
    if isinstance(value, enum.Enum):
        return _plain(value.value, place, arrays, above)
    if isinstance(value, pathlib.PurePath):
        return str(value)
    if isinstance(value, omegaconf.Container):
        value = omegaconf.OmegaConf.to_container(value, resolve=True, enum_to_str=True)
    if id(value) in above:
        raise _refusal(value, place, "which holds itself")
    above = (*above, id(value))
    if isinstance(value, dict):
        items = [(_key(key, place, above), each) for key, each in value.items()]
        items = [(key, _plain(each, (*place, key), arrays, above)) for key, each in items]
        kind = next(each for each in (collections.OrderedDict, collections.Counter, dict) if isinstance(value, each))
        plain = kind(dict(items))
        if kind is collections.OrderedDict:
            # load_state_dict reads the versions of modules from an attribute
            vars(plain).update(_plain(vars(value), place, [], above))
        return plain
    if isinstance(value, (list, tuple, collections.deque)) and not isinstance(value, torch.Size):
        plain = [_plain(each, (*place, index), arrays, above) for index, each in enumerate(value)]
        return tuple(plain) if isinstance(value, tuple) else plain
    if isinstance(value, (set, frozenset)):
        return {_key(each, place, above) for each in value}
    if type(value) in _objects():
        plain = type(value).__new__(type(value))
        vars(plain).update(_plain(vars(value), place, arrays, above))
        return plain
    for kind, exact in _EXACT.items():
        if isinstance(value, kind) and type(value) is not kind:
            return _plain(exact(value), place, arrays, above)
    if _loads(value):
        return value
    raise _refusal(value, place)


def _key(value, place, above):
    plain = _plain(value, place, [], above)
    try:
        hash(plain)
    except TypeError:  # a frozenset has become a set
        raise _refusal(value, place, "as a key") from None
    return plain


def _number(value, place):
    item = value.item() if value.dtype.kind in _NUMBERS + "US" else value
    if isinstance(item, np.generic):  # no number of Python's equals a long double
        raise _refusal(value, place)
    return item


def _tensor(value, place, arrays):
    if value.dtype.kind not in _NUMBERS or isinstance(value, np.ma.MaskedArray):
        raise _refusal(value, place, f"an array of {value.dtype}")
    dtype = np.dtype(f"={value.dtype.kind}{value.dtype.itemsize}")
    try:
        # torch takes neither another order of bytes nor negative strides nor every name of a dtype
        tensor = torch.from_numpy(np.array(value, dtype).view(dtype))
    except TypeError:
        raise _refusal(value, place, f"an array of {value.dtype}") from None
    arrays.append(place)
    return tensor


def _loads(value):
    file = io.BytesIO()
    try:
        torch.save(value, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception:  # pickle and the classes themselves raise anything
        return False
    return True


def _refusal(value, place, what=None):
    name = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    where = "".join(f".{key}" if isinstance(key, str) else f"[{key!r}]" for key in place).removeprefix(".")
    return UsageError(
        f"{where or 'the state'} holds {name}{f' ({what})' if what else ''}, which no checkpoint can hold: it would be "
        "refused when it is loaded. Let state_dict() give numbers, strings, tensors, and lists and dicts of them"
    )

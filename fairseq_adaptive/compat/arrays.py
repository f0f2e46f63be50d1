"""NumPy's arrays of numbers in checkpoints that others wrote, read without NumPy's own unpickling."""

import contextlib
import functools
import pickle
import re
import threading

import numpy as np
import torch


def _checked(read):
    """What is malformed in a file is told as torch's loader tells it."""

    @functools.wraps(read)
    def reads(*args):
        try:
            return read(*args)
        except (TypeError, ValueError, LookupError) as error:
            raise pickle.UnpicklingError(f"no NumPy array: {error}") from None

    return reads


class _Dtype:
    """What the file says of an array's dtype; NumPy's own ``__setstate__`` would take fields and flags from it."""

    @_checked
    def __init__(self, name, align=False, copy=True):
        if not re.fullmatch(r"[biufc][0-9]+", str(name)):
            raise pickle.UnpicklingError(f"GLOBAL numpy.dtype({name!r})")
        self.dtype = np.dtype(name)

    @_checked
    def __setstate__(self, state):
        self.dtype = self.dtype.newbyteorder(state[1])


class SavedArray:
    """An array in a checkpoint, in :attr:`array`. Unlike NumPy's own reading, it never takes a dtype with objects."""

    array = np.empty(0)

    @_checked
    def __setstate__(self, state):
        version, shape, dtype, fortran_order, data = state
        array = np.frombuffer(data, _real(dtype)) if data else np.empty(0, _real(dtype))
        array = array.reshape(shape, order="F" if fortran_order else "C")
        self.array = array.astype(array.dtype.newbyteorder("="))  # a copy: that of the file's bytes is read-only


def _real(dtype):
    if type(dtype) is not _Dtype:
        raise pickle.UnpicklingError(f"GLOBAL {type(dtype).__name__} as a NumPy dtype")
    return dtype.dtype


def _reconstruct(kind, shape, code):
    return SavedArray()


@_checked
def _scalar(dtype, data):
    return np.frombuffer(data, _real(dtype), count=1)[0].item()


def _empty_bytes():
    return b""


_SAFE = [(SavedArray, "numpy.ndarray"), (_Dtype, "numpy.dtype"), (_empty_bytes, "builtins.bytes")] + [
    (function, f"numpy.{core}.multiarray.{name}")
    for core in ("core", "_core")
    for function, name in ((_reconstruct, "_reconstruct"), (_scalar, "scalar"))
]
_loading = threading.RLock()


def _name(allowed):
    return allowed[1] if isinstance(allowed, tuple) else f"{allowed.__module__}.{allowed.__qualname__}"


@contextlib.contextmanager
def numeric_arrays():
    """A context in which torch's safe loader reads NumPy's numbers, as Python's, and arrays, as :class:`SavedArray`.

    A ``--user-dir`` that has allowed NumPy's own classes gets these. One thread at a time is in it, since what torch
    allows is allowed for all.
    """
    with _loading:
        if {name for _, name in _SAFE} & {_name(each) for each in torch.serialization.get_safe_globals()}:
            yield
        else:
            with torch.serialization.safe_globals(_SAFE):
                yield

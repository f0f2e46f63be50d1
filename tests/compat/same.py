"""Whether what was loaded is what was saved."""

import argparse
import collections

import numpy as np
import torch
from fairseq.data import Dictionary


def differences(loaded, saved, place="state"):
    """The places where ``loaded`` has not the value of ``saved``, in a class that stands for its own.

    NumPy's numbers may be Python's, a container may be of the class that its own extends, a deque a list. Arrays must be
    arrays of the same dtype, tensors tensors.
    """
    if isinstance(saved, np.ndarray):
        good = (
            type(loaded) is np.ndarray
            and loaded.dtype == saved.dtype.newbyteorder("=")
            and loaded.shape == saved.shape
            and np.array_equal(loaded, saved, equal_nan=saved.dtype.kind in "fc")
        )
    elif torch.is_tensor(saved):
        good = torch.is_tensor(loaded) and loaded.dtype == saved.dtype and torch.equal(loaded, saved.detach())
    elif isinstance(saved, dict):
        kind = collections.OrderedDict if isinstance(saved, collections.OrderedDict) else dict
        if not isinstance(loaded, kind) or list(loaded) != list(saved):
            return [place]
        return [each for key in saved for each in differences(loaded[key], saved[key], f"{place}.{key}")]
    elif isinstance(saved, (list, tuple, collections.deque)):
        if not isinstance(loaded, tuple if isinstance(saved, tuple) else list) or len(loaded) != len(saved):
            return [place]
        return [
            each
            for index, (one, other) in enumerate(zip(loaded, saved))
            for each in differences(one, other, f"{place}[{index}]")
        ]
    elif isinstance(saved, (argparse.Namespace, Dictionary)):
        return differences(vars(loaded), vars(saved), place) if type(loaded) is type(saved) else [place]
    elif isinstance(saved, (set, frozenset)):
        good = type(loaded) is set and loaded == saved
    elif isinstance(saved, np.generic):
        good = type(loaded) is type(saved.item()) and (loaded == saved or bool(loaded != loaded and saved != saved))
    else:
        good = type(loaded) is type(saved) and (loaded == saved or loaded != loaded and saved != saved)
    return [] if good else [place]

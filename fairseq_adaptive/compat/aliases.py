"""Patches of fairseq's use of NumPy: names and arguments that NumPy has taken away."""

import types

import numpy as np


def _numpy_with(**names):
    """NumPy with further names, for one module of fairseq: what else is imported sees NumPy as it is."""
    module = types.ModuleType("numpy")
    module.__dict__.update(vars(np), **names)
    return module


def restore_np_float():
    """``nacrf_transformer`` trains: its CRF uses ``np.float``, which went with NumPy 1.24."""
    from fairseq.modules import dynamic_crf_layer

    dynamic_crf_layer.np = _numpy_with(float=float)


def restore_np_int():
    """``compute_mask_indices`` masks spans that do not overlap (``--no-mask-overlap``).

    It uses ``np.int``, which went with NumPy 1.24, and ``randint`` of a generator, which has it under another name.
    """
    from fairseq.data import data_utils

    class Generator(np.random.Generator):
        randint = np.random.Generator.integers

    random = types.ModuleType("numpy.random")
    random.__dict__.update(vars(np.random), default_rng=lambda seed=None: Generator(np.random.PCG64(seed)))
    data_utils.np = _numpy_with(int=int, random=random)


def name_percentile_method():
    """``--num-batch-buckets`` finds its buckets.

    fairseq passes ``interpolation`` to ``np.percentile``, which NumPy renamed to ``method`` and then took away.
    """
    from fairseq.data import bucket_pad_length_dataset, data_utils
    from fairseq.data.audio import raw_audio_dataset

    def get_buckets(sizes, num_buckets):
        """Up to ``num_buckets`` lengths, ascending, each the upper end of an equal share of ``sizes``."""
        shares = np.linspace(0, 100, num_buckets + 1)[1:]
        return np.unique(np.percentile(sizes, shares, method="lower"))

    for module in data_utils, bucket_pad_length_dataset, raw_audio_dataset:
        module.get_buckets = get_buckets

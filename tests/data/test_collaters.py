"""Every data set makes an empty batch of no samples: a worker without batches left is given it."""

import inspect
import pkgutil
from importlib import import_module

import pytest
from fairseq.data import FairseqDataset

import fairseq_adaptive.data

MODULES = [
    import_module(f"fairseq_adaptive.data.{each.name}") for each in pkgutil.iter_modules(fairseq_adaptive.data.__path__)
]
DATASETS = [
    each
    for module in MODULES
    for _, each in inspect.getmembers(module, inspect.isclass)
    if issubclass(each, FairseqDataset) and each.__module__ == module.__name__
]


@pytest.mark.parametrize("dataset", DATASETS, ids=lambda each: each.__name__)
def test_no_samples_make_an_empty_batch(dataset):
    assert dataset.__new__(dataset).collater([]) == {}


def test_all_data_sets_are_asked():
    assert {"ImageDataset", "GeneratedParityDataset", "SegmentedDataset", "SOPDataset", "SpanDataset"} <= {
        each.__name__ for each in DATASETS
    }

"""Patches of how fairseq reads binarised data and dictionaries: what is damaged or does not fit is said in one line."""

import os
import struct

import numpy as np

from fairseq_adaptive.errors import UsageError

_HEADER = struct.Struct("<9sQBQ")  # magic, version, code of the type, number of sentences
_SCANNED = 2**28  # tokens that are looked at, at most


def _damaged(path, what):
    return UsageError(
        f"{path}.idx and {path}.bin are no whole result of fairseq-preprocess: {what}. Binarise the text again"
    )


def _no_sentence(path):
    return UsageError(f"{path} has no sentence: take another split, or binarise a text that is not empty")


def _check_memory_map(path, dtypes):
    """Refuse an index and a data file that do not belong together, before they are mapped into memory."""
    with open(f"{path}.idx", "rb") as file:
        header = file.read(_HEADER.size)
        if len(header) < _HEADER.size:
            raise _damaged(path, "the index is cut short")
        _, version, code, count = _HEADER.unpack(header)
        if version != 1 or code not in dtypes:
            raise _damaged(path, f"the index has version {version} and type {code}")
        if os.path.getsize(f"{path}.idx") != _HEADER.size + 12 * count:
            raise _damaged(path, f"the index is not as long as one of {count:,} sentences")
        if not count:
            raise _no_sentence(path)
        lengths = np.fromfile(file, dtype=np.int32, count=count)
    expected = int(lengths.sum(dtype=np.int64)) * np.dtype(dtypes[code]).itemsize
    found = os.path.getsize(f"{path}.bin")
    if found != expected or (lengths < 0).any():
        raise _damaged(path, f"by the index the data have {expected:,} bytes, and they have {found:,}")


def check_binaries():
    """Binarised data that are cut short, empty or of another dictionary are refused when they are loaded.

    fairseq fails with errors of ``struct`` and ``mmap``, in the middle of an epoch, on a GPU with an assertion of CUDA,
    or reads other tokens than were written. An empty split fails behind the work, or has the perplexity 1.
    """
    from fairseq.data import data_utils, indexed_dataset

    stock_make, stock_load = indexed_dataset.make_dataset, data_utils.load_indexed_dataset
    memory_map = indexed_dataset.MMapIndexedDataset

    def make_dataset(path, impl, *args, **kwargs):
        if impl in ("mmap", "cached", "lazy") and indexed_dataset.IndexedDataset.exists(path):
            with open(f"{path}.idx", "rb") as file:
                magic = file.read(9)
            if magic == memory_map.Index._HDR_MAGIC:
                if impl != "mmap":
                    raise UsageError(f"{path} is not of --dataset-impl {impl} but of mmap; leave the flag out")
                _check_memory_map(path, indexed_dataset._code_to_dtype)
            elif magic[:8] != indexed_dataset.IndexedDataset._HDR_MAGIC or impl == "mmap":
                raise _damaged(path, "the index is empty or of another kind")
        try:
            return stock_make(path, impl, *args, **kwargs)
        except (AssertionError, KeyError, ValueError, struct.error) as error:
            raise _damaged(path, f"{type(error).__name__} {error}") from error

    def load_indexed_dataset(path, dictionary=None, *args, **kwargs):
        dataset = stock_load(path, dictionary, *args, **kwargs)
        if dataset is None:
            return None
        if not len(dataset):
            raise _no_sentence(path)
        for part in getattr(dataset, "datasets", [dataset]):
            if dictionary is not None and isinstance(part, memory_map):
                _check_tokens(part, path, dictionary)
        return dataset

    def _check_tokens(dataset, path, dictionary):
        tokens = np.frombuffer(dataset._bin_buffer, dtype=dataset._index.dtype)
        tokens = tokens[:: 1 + len(tokens) // _SCANNED]
        largest = int(tokens.max(initial=0))
        if largest >= len(dictionary) or tokens.min(initial=0) < 0:
            raise UsageError(
                f"{path} has token number {largest:,}, and the dictionary {len(dictionary):,} entries: "
                "use the dict.txt that fairseq-preprocess wrote with these data, or binarise again"
            )

    indexed_dataset.make_dataset, data_utils.load_indexed_dataset = make_dataset, load_indexed_dataset


def check_dictionaries():
    """A dictionary that is empty, not UTF-8, or has a word twice is refused with the line and what would be right."""
    from fairseq.data import Dictionary

    stock = Dictionary.add_from_file

    def add_from_file(self, f):
        name = f if isinstance(f, str) else getattr(f, "name", "the dictionary")
        before = len(self)
        try:
            stock(self, f)
        except FileNotFoundError:
            raise UsageError(f"there is no dictionary {name}: fairseq-preprocess writes it beside the data") from None
        except IsADirectoryError:
            raise UsageError(f"{name} is a folder, and a dictionary was expected") from None
        except UsageError:
            raise
        except Exception as error:
            if "Incorrect encoding" in str(error):
                raise UsageError(f"{name} is not UTF-8: convert it, as with iconv -t UTF-8") from None
            if "Duplicate word" in str(error):
                word = str(error).split(": ", 1)[1].split(". ")[0]
                raise UsageError(
                    f"{name} has the word {word} twice: take one line out and binarise again, since the "
                    "numbers of all words behind it change"
                ) from None
            if "Incorrect dictionary format" in str(error):
                line = " ".join(str(error).split(": ", 1)[1].split())
                raise UsageError(f"{name} has the line {line}: a line is a word and its count") from None
            raise
        if isinstance(f, str) and len(self) == before:
            raise UsageError(f"{name} is empty: a line is a word and its count")

    Dictionary.add_from_file = add_from_file

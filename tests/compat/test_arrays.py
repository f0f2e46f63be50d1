"""Checkpoints with NumPy's numbers and arrays in them, as stock fairseq and older versions of this plug-in wrote them."""

import concurrent.futures
import pickle
import zipfile

import numpy as np
import pytest
import torch
from compat.same import differences
from fairseq import checkpoint_utils

from fairseq_adaptive.compat.arrays import numeric_arrays
from fairseq_adaptive.errors import UsageError

STATES = {
    "bleu": [(10, "_bleu_counts", "AverageMeter", {"val": np.array([3, 2, 1, 0]), "sum": np.array([9, 5, 2, 0])})],
    "numbers": {"best": np.float64(81.5), "all": [np.int64(3), (np.bool_(True), np.float32(0.1), np.complex64(1j))]},
    "orders": [
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.array([1, 2], ">i4"),
        np.array(2.5),
        np.empty((0, 3), np.float16),
        np.array([[True], [False]]),
        np.array([2**63], np.uint64),
    ],
}


def write(path, state, spelling, zipped):
    """Save ``state`` as it is, with the module names of NumPy 1 or 2."""
    torch.save(state, path, _use_new_zipfile_serialization=zipped)

    def spell(data):
        for old in b"numpy._core.multiarray", b"numpy.core.multiarray":
            data = data.replace(b"c" + old + b"\n", b"c" + spelling.encode() + b".multiarray\n")
        return data

    if not zipped:
        path.write_bytes(spell(path.read_bytes()))
        return
    with zipfile.ZipFile(path) as file:
        parts = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w") as file:
        for name, data in parts.items():
            file.writestr(name, spell(data) if name.endswith("data.pkl") else data)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("spelling", ["numpy.core", "numpy._core"])
@pytest.mark.parametrize("name", STATES)
def test_old_checkpoints_load(name, spelling, zipped, complete, tmp_path):
    path = tmp_path / "old.pt"
    write(path, complete({"old": STATES[name]}), spelling, zipped)
    with pytest.raises(pickle.UnpicklingError, match=rf"{spelling}\.multiarray\.(_reconstruct|scalar)"):
        torch.load(path, weights_only=True)
    loaded = checkpoint_utils.load_checkpoint_to_cpu(str(path))["extra_state"]["old"]
    assert differences(loaded, STATES[name]) == []
    arrays = loaded if name == "orders" else []
    assert all(array.flags.writeable for array in arrays)


def test_loading_allows_nothing_else_afterwards(complete, tmp_path):
    allowed = set(torch.serialization.get_safe_globals())
    torch.save(complete({"old": STATES["bleu"]}), tmp_path / "old.pt")
    checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "old.pt"))
    assert set(torch.serialization.get_safe_globals()) == allowed


def test_threads_wait_for_each_other(complete, tmp_path):
    """What torch allows is allowed in all threads: the first to leave would forbid it to the others."""
    torch.save(complete({"old": STATES["bleu"]}), tmp_path / "old.pt")
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        with numeric_arrays():
            loading = thread.submit(checkpoint_utils.load_checkpoint_to_cpu, str(tmp_path / "old.pt"))
            with pytest.raises(concurrent.futures.TimeoutError):
                loading.result(timeout=1)
        assert differences(loading.result(timeout=60)["extra_state"]["old"], STATES["bleu"]) == []


def test_classes_that_a_user_allows(complete, tmp_path):
    torch.save(complete({"old": np.array(["a"])}), tmp_path / "old.pt")
    allow = [np.ndarray, np.dtype, np.dtypes.StrDType, np.array(0).__reduce__()[0]]
    with torch.serialization.safe_globals(allow):
        assert checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "old.pt"))["extra_state"]["old"] == ["a"]


class Reduced:
    """Pickles as told."""

    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced

    def __repr__(self):  # the same in all workers of a test run
        return "Reduced"


_reconstruct = np.array(0).__reduce__()[0]
_scalar = np.float64(0).__reduce__()[0]


def array(dtype, data, shape=(1,)):
    return Reduced(_reconstruct, (np.ndarray, (0,), b"b"), (1, shape, dtype, False, data))


@pytest.mark.parametrize(
    "value",
    [
        np.array([{"a": 1}, None]),
        np.array([1, "a"], object),
        np.zeros(2, [("a", "O")]),
        np.zeros(2, [("a", "i4")]),
        np.array(["a"]),
        np.array(["2026-01-01"], "M8[D]"),
        np.datetime64("2026-01-01"),
        np.str_("a"),
        np.void(b"ab"),
        np.dtype("O"),
        array(np.dtype("V8"), b"\1" * 8),
        array(None, b"\1" * 8),
        array("i8", b"\1" * 8),
    ],
    ids=repr,
)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_no_numbers(value, zipped, complete, tmp_path):
    """An array of objects above all: it holds what only an unpickler that runs code could make."""
    torch.save(complete({"old": [value]}), tmp_path / "old.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UsageError, match=r"^checkpoint .*old\.pt is refused: it holds (numpy|NoneType|str)"):
        checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "old.pt"))


@pytest.mark.parametrize(
    "value",
    [
        array(np.dtype("i8"), b"\1" * 9),
        array(np.dtype("i8"), b"\1" * 8, (2**40,)),
        array(np.dtype("i8"), b"", (3,)),
        array(np.dtype("i8"), "text"),
        Reduced(_reconstruct, (np.ndarray, (0,), b"b"), (1, (1,))),
        Reduced(_scalar, (np.dtype("f8"), b"\1\1")),
        Reduced(np.dtype, ("i3", False, True)),
        Reduced(np.dtype, ("f8", False, True), (3,)),
        Reduced(_scalar, (np.dtype("f8"), b"")),
    ],
)
def test_damaged_arrays(value, complete, tmp_path):
    torch.save(complete({"old": [value]}), tmp_path / "old.pt")
    with pytest.raises(UsageError, match=r"^checkpoint .*old\.pt cannot be read"):
        checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "old.pt"))


def test_a_forged_dtype(complete, tmp_path):
    """NumPy's own reading takes fields that lie outside of an element, and flags that hide objects."""
    fields = (3, "|", None, ("a",), {"a": (np.dtype("i8"), 2**30)}, 8, 1, 0)
    dtype = Reduced(np.dtype, ("i8", False, True), fields)
    torch.save(complete({"old": array(dtype, b"\1" * 8)}), tmp_path / "old.pt")
    loaded = checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "old.pt"))["extra_state"]["old"]
    assert loaded.dtype == np.int64 and loaded.tolist() == [0x0101010101010101]


@pytest.mark.parametrize("places", [3, [["extra_state", "a"]], None])
def test_a_forged_list_of_places(places, complete, tmp_path):
    torch.save({**complete({"a": torch.ones(1)}), "numpy_arrays": places}, tmp_path / "old.pt")
    with pytest.raises(UsageError, match="numpy_arrays is no list of places"):
        checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "old.pt"))

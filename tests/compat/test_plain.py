"""What fairseq and tasks put into a checkpoint comes out of it again."""

import argparse
import collections
import datetime
import decimal
import enum
import fractions
import functools
import io
import pathlib
import random

import numpy as np
import pytest
import torch
from compat.same import differences
from fairseq.data import Dictionary
from fairseq.dataclass.constants import ChoiceEnum
from fairseq.logging import meters
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps
from omegaconf import OmegaConf

from fairseq_adaptive.compat.plain import make_plain, restore_arrays
from fairseq_adaptive.errors import UsageError

Pair = collections.namedtuple("Pair", "first second")
Choice = ChoiceEnum(["hard", "soft"])


class Level(enum.IntEnum):
    HIGH = 3


class Name(str):
    def __str__(self):
        return "not the value"


NUMBERS = [
    np.bool_(True),
    np.int8(-3),
    np.uint16(7),
    np.int64(2**62),
    np.uint64(2**64 - 1),
    np.float16(0.5),
    np.float32(0.1),
    np.float64(1e300),
    np.float64("nan"),
    np.float64("-inf"),
    np.complex64(1 + 2j),
    np.str_("a"),
    np.bytes_(b"ab"),
]
ARRAYS = [
    np.arange(3),
    np.array([800, 796]),
    np.array(2.5),
    np.ones((2, 3), np.float32)[:, ::-1],
    np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    np.array([1, 2], ">i4"),
    np.array([1.5, np.nan], "<f2"),
    np.array([True, False]),
    np.array([1j]),
    np.empty((0, 4)),
    np.array([2**63], np.uint64),
    np.zeros(2, "Q"),
    np.random.RandomState(1).get_state()[1],
    np.matrix([[1, 2]]),
    np.broadcast_to(np.int16(4), (2, 2)),
]
CONTAINERS = {
    "dict": lambda value: {"a": value},
    "list": lambda value: [1, value],
    "tuple": lambda value: ("a", value),
    "OrderedDict": lambda value: collections.OrderedDict(b=1, a=value),
    "defaultdict": lambda value: collections.defaultdict(list, a=value),
    "namedtuple": lambda value: Pair(value, 2),
    "deque": lambda value: collections.deque([value], maxlen=3),
    "Namespace": lambda value: argparse.Namespace(a=value),
    "as fairseq's meters": lambda value: [(10, "name", "AverageMeter", {"val": value, "sum": value, "count": 1})],
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("value", NUMBERS + ARRAYS, ids=lambda value: f"{type(value).__name__}-{value.dtype.str}")
def test_numpy_everywhere(value, container, through_a_file):
    state = {"outer": [CONTAINERS[container](value)]}
    assert differences(through_a_file(state), state) == []


@pytest.mark.parametrize("number", NUMBERS[:-3], ids=lambda value: value.dtype.str)
def test_numpy_in_sets_and_keys(number, through_a_file):
    state = {"set": {number}, "key": {number: 1}, "tuple": {(number, "a"): np.arange(2)}, "frozen": frozenset([number])}
    loaded = through_a_file(state)
    if number == number:
        assert differences(loaded, state) == []
    keys = [*loaded["set"], *loaded["key"], *loaded["frozen"], *(key[0] for key in loaded["tuple"])]
    assert [type(key) for key in keys] == [type(number.item())] * 4
    assert type(loaded["tuple"].popitem()[1]) is np.ndarray


leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text()
    | st.binary(min_size=1)
    | nps.from_dtype(np.dtype("f4"))
    | nps.from_dtype(np.dtype("i8"))
    | nps.from_dtype(np.dtype("?"))
    | nps.arrays(
        nps.boolean_dtypes()
        | nps.integer_dtypes(endianness="?")
        | nps.unsigned_integer_dtypes()
        | nps.floating_dtypes(sizes=(16, 32, 64), endianness="?")
        | nps.complex_number_dtypes(sizes=(64, 128)),
        nps.array_shapes(min_dims=0, min_side=0, max_side=3),
    )
)
keys = st.text() | st.integers(0, 9) | st.integers(0, 9).map(np.int32) | st.tuples(st.integers(0, 9).map(np.int64))
nested = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(keys, inner, max_size=3)
        | st.dictionaries(keys, inner, max_size=3).map(collections.OrderedDict)
        | st.builds(Pair, inner, inner)
        | st.lists(inner, max_size=3).map(tuple)
        | st.lists(inner, max_size=3).map(collections.deque)
        | st.builds(argparse.Namespace, a=inner)
        | st.sets(keys, max_size=3)
        | st.dictionaries(keys, inner, max_size=3).map(lambda items: collections.defaultdict(list, items))
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(state=nested)
def test_any_state(state):
    file = io.BytesIO()
    torch.save(make_plain({"extra_state": state}), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    restore_arrays(loaded)
    assert differences(loaded, {"extra_state": state}) == []


@pytest.mark.parametrize(
    "value, plain",
    [
        (Choice.hard, "hard"),
        (Level.HIGH, 3),
        (Name("value"), "value"),
        (pathlib.Path("a/b"), str(pathlib.Path("a/b"))),
        (OmegaConf.create({"a": [1, {"b": "${a.0}"}]}), {"a": [1, {"b": 1}]}),
        (torch.finfo(torch.half).tiny, 2**-14),
        (collections.Counter("aab"), collections.Counter(a=2, b=1)),
        (torch.Size([2, 3]), torch.Size([2, 3])),
        (torch.float16, torch.float16),
        (torch.device("cpu"), torch.device("cpu")),
        (2**1999, 2**1999),
        (bytearray(b"a"), bytearray(b"a")),
        (torch.ones(2).max(0), (torch.tensor(1.0), torch.tensor(0))),
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_classes(value, plain, through_a_file):
    loaded = through_a_file({"value": [value]})["value"][0]
    assert type(loaded) is type(plain) and loaded == plain


def test_dictionary_of_a_task(through_a_file):
    """As in ``task_state`` of audio_finetuning, audio_classification, nlu_finetuning and hubert_pretraining."""
    words = Dictionary()
    words.add_symbol("word", n=np.int64(3))
    loaded = through_a_file({"target_dictionary": words})["target_dictionary"]
    assert loaded == words and loaded.index("word") == 4 and loaded.count[4] == 3
    assert type(words.count[4]) is np.int64


def test_random_states(through_a_file):
    numpy_state, python_state = np.random.RandomState(3), random.Random(3)
    bits = np.random.default_rng(3)
    loaded = through_a_file(
        {"numpy": numpy_state.get_state(), "python": python_state.getstate(), "bits": bits.bit_generator.state}
    )
    others = np.random.RandomState(4), random.Random(4), np.random.default_rng(4)
    others[0].set_state(loaded["numpy"])
    others[1].setstate(loaded["python"])
    others[2].bit_generator.state = loaded["bits"]
    assert [others[0].rand(), others[1].random(), others[2].random()] == [
        numpy_state.rand(),
        python_state.random(),
        bits.random(),
    ]


def test_versions_of_modules_stay():
    state = torch.nn.BatchNorm1d(2).state_dict()
    assert make_plain({"model": state})["model"]._metadata == state._metadata != {}


def _tensor_with(attribute):
    tensor = torch.ones(1)
    tensor.note = attribute
    return tensor


_cycle = []
_cycle.append(_cycle)


@pytest.mark.parametrize(
    "value, words",
    [
        (datetime.date(2026, 1, 1), "datetime.date"),
        (decimal.Decimal(1), "decimal.Decimal"),
        (fractions.Fraction(1, 2), "fractions.Fraction"),
        (functools.partial(int), "functools.partial"),
        (int, "type"),
        (len, "builtin_function_or_method"),
        (range(3), "range"),
        (2**5000, "int"),
        (b"", "bytes"),
        (torch.nn.Linear(1, 1), r"torch\.nn\.modules\.linear\.Linear"),
        (torch.Generator(), "Generator"),
        (np.array([1, None]), r"numpy.ndarray \(an array of object\)"),
        (np.array(["a"]), r"an array of <U1"),
        (np.array(["2026-01-01"], "M8[D]"), r"an array of datetime64\[D\]"),
        (np.datetime64("2026-01-01"), "datetime64"),
        (np.zeros(1, [("a", "i4")]), "an array of"),
        (np.ma.masked_array([1, 2], [0, 1]), "MaskedArray"),
        (np.longdouble(1), "longdouble"),
        (np.zeros(1, np.longdouble), "an array of"),
        (_cycle, "which holds itself"),
        ({frozenset([1]): 2}, r"frozenset \(as a key\)"),
        (_tensor_with(len), "torch.Tensor"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_no_plain_form(value, words, complete, tmp_path):
    from fairseq import checkpoint_utils

    state = complete({"metrics": {"valid": [(10, "name", "AverageMeter", {"sum": value})]}})
    with pytest.raises(
        UsageError,
        match=rf"cannot save checkpoint .*a\.pt: extra_state\.metrics\.valid\[0\]\[3\]\.sum"
        rf".* holds (numpy\.)?(ma\.core\.)?.*{words}",
    ):
        checkpoint_utils.torch_persistent_save(state, str(tmp_path / "a.pt"))
    assert not list(tmp_path.iterdir())


def _average(value):
    meter = meters.AverageMeter(round=3)
    meter.update(value, n=2)
    return meter


def _sum(value):
    meter = meters.SumMeter()
    meter.update(value)
    return meter


def _time(value):
    meter = meters.TimeMeter()
    meter.update(value)
    return meter


def _stopwatch(value):
    meter = meters.StopwatchMeter()
    meter.start()
    meter.stop(value)
    return meter


def _concatenate(value):
    meter = meters.ConcatTensorMeter()
    meter.update(torch.as_tensor(np.atleast_1d(value)))
    return meter


@pytest.mark.parametrize(
    "value",
    [
        np.array([3, 4]),
        np.array(1.5),
        np.array([0.1], np.float32),
        np.float64(0.3),
        np.int64(5),
        np.bool_(True),
        torch.tensor([1, 2]),
        torch.tensor(0.25),
    ],
    ids=lambda value: f"{type(value).__name__}-{value.dtype}-{value.ndim}d",
)
@pytest.mark.parametrize("kind", [_average, _sum, _time, _stopwatch, _concatenate])
def test_meters_go_on(kind, value, through_a_file):
    """A resumed meter has the values of the one that was saved, which is left alone, and so has the next sum."""
    live = meters.MetersDict()
    live.add_meter("meter", kind(value), 10)
    live.add_meter("derived", meters.MetersDict._DerivedMeter(lambda all_meters: 1), 20)
    state = live.state_dict()
    before = repr(state)
    resumed = meters.MetersDict()
    resumed.load_state_dict(through_a_file({"metrics": {"valid": state}})["metrics"]["valid"])
    assert repr(state) == before
    one, other = live["meter"], resumed["meter"]
    assert type(one) is type(other)
    for meter in (one, other):
        if kind is not _stopwatch:
            meter.update(torch.as_tensor(np.atleast_1d(value)) if kind is _concatenate else value)
    states = [
        {
            key: each.item() if isinstance(each, np.generic) else each
            for key, each in meter.state_dict().items()
            if key != "init"
        }
        for meter in (other, one)
    ]  # init: seconds
    assert differences(*states) == []

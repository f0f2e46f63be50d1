"""Whose matrix products run is measured once a machine, and forged measurements lead to each choice."""

import json
import os
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from cli.helpers import USER_DIR
from fairseq_adaptive import info
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules.layers.prepacked_linear import PrepackedWeights
from fairseq_adaptive.ops import matmul, native, probe

ROWS, WIDTH, OUT = 130, 96, 101
SIZES = len(probe.SIZES)
needs_onednn = pytest.mark.skipif(
    not matmul.can_prepack(torch.ones(2, 2)), reason="this torch multiplies without oneDNN"
)


def speeds(**fast):
    """All products run at 50 GFLOP/s but for some, ``fp32_torch=90`` or one figure for each size."""
    found = {name: [50.0] * SIZES for name in probe._NAMES}
    for name, speed in fast.items():
        found[name.replace("_", " ")] = speed if isinstance(speed, list) else [float(speed)] * SIZES
    return found


@pytest.fixture
def forge(monkeypatch):
    """``forge(fp32_torch=90)``: what :func:`speeds` says is what has been measured, and products go by it."""

    def forge(**fast):
        monkeypatch.setenv(probe.VARIABLE, "auto")
        monkeypatch.setattr(probe, "_KNOWN", {torch.get_num_threads(): probe.Figures(speeds(**fast))})

    return forge


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of its own, for a process that has measured nothing; the folder of the figures."""
    monkeypatch.setenv("FAIRSEQ_ADAPTIVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(probe, "_KNOWN", {})
    return tmp_path / "cache" / "products"


@pytest.fixture
def measured(monkeypatch):
    """A list that grows with each measurement, the numbers of threads; each finds another speed of torch."""
    found = []

    def measure(threads):
        found.append(threads)
        return speeds(fp32_torch=60.0 + len(found))

    monkeypatch.setattr(probe, "measure", measure)
    return found


def forget():
    """As a new process."""
    probe._KNOWN.clear()


@pytest.mark.parametrize(
    "fast, changing, constant",
    [
        ({}, "onednn", "prepacked"),
        ({"fp32_torch": 54}, "onednn", "prepacked"),  # a tie
        ({"fp32_torch": 56}, "torch", "torch"),
        ({"fp32_onednn": 60}, "onednn", "onednn"),
        ({"fp32_prepacked": 60}, "onednn", "prepacked"),
        ({"fp32_torch": 90, "fp32_prepacked": 85}, "torch", "prepacked"),
        ({"fp32_onednn": 0, "fp32_prepacked": 0}, "torch", "torch"),  # they do not run here
        ({"bf16_torch": 900}, "onednn", "prepacked"),
    ],
)
def test_figures_choose(fast, changing, constant, forge):
    forge(**fast)
    x, weight = torch.ones(ROWS, WIDTH), torch.ones(OUT, WIDTH)
    assert matmul.choose(x, weight) == changing
    assert matmul.choose(x, weight, constant=True) == constant


@pytest.mark.parametrize(
    "rows, weights, size",
    [(1, 2**16, 0), (5, 2**16, 1), (130, 2**17, 2), (9000, 5, 3), (3, 2**19, 4), (44, 2**30, 5), (46, 2**20, 6)],
)
def test_the_nearest_size_decides(rows, weights, size):
    figures = probe.Figures(speeds(fp32_torch=[90.0 if number == size else 50.0 for number in range(SIZES)]))
    assert figures.faster(rows, weights, probe.KINDS) == "torch"
    others = [each for each in range(SIZES) if each != size]
    figures = probe.Figures(speeds(fp32_torch=[90.0 if number in others else 50.0 for number in range(SIZES)]))
    assert figures.faster(rows, weights, probe.KINDS) == "prepacked"


@pytest.mark.parametrize("asked, constant", [("torch", "torch"), ("onednn", "prepacked")])
def test_a_library_that_is_asked_for_is_not_measured(asked, constant, monkeypatch):
    monkeypatch.setattr(probe, "figures", None)
    monkeypatch.setenv(probe.VARIABLE, asked)
    x, weight = torch.ones(ROWS, WIDTH), torch.ones(OUT, WIDTH)
    assert (matmul.choose(x, weight), matmul.choose(x, weight, constant=True)) == (asked, constant)


@needs_onednn
def test_a_wrong_name(monkeypatch):
    monkeypatch.setenv(probe.VARIABLE, "mkl")
    message = "FAIRSEQ_ADAPTIVE_PRODUCTS=mkl is unknown: choose one of auto, torch, onednn"
    with pytest.raises(UsageError, match=message):
        matmul.linear(torch.ones(ROWS, WIDTH), torch.ones(OUT, WIDTH))
    assert info.products() == [("products", f"error: {message}")]


@needs_onednn
@pytest.mark.parametrize("kind", probe.KINDS)
def test_products_are_equal_under_each_choice(kind, forge, monkeypatch):
    forge(**{f"fp32_{kind}": 90})
    own, packed = [], []
    onednn, prepacked = matmul._onednn, matmul.Prepacked
    monkeypatch.setattr(matmul, "_onednn", lambda *args: own.append(args) or onednn(*args))
    monkeypatch.setattr(matmul, "Prepacked", lambda *args: packed.append(args) or prepacked(*args))
    torch.manual_seed(1)
    x, weight, bias = (torch.randn(*shape) for shape in ((ROWS, WIDTH), (OUT, WIDTH), (OUT,)))

    def results(function, *leaves):
        leaves = [each.detach().requires_grad_() for each in leaves]
        y = function(*leaves)
        y.sin().sum().backward()
        return [y.detach(), *(each.grad for each in leaves)]

    exact = results(F.linear, x.double(), weight.double(), bias.double())
    for mine, theirs in zip(results(matmul.linear, x, weight, bias), exact):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-4)
    assert len(own) == (0 if kind == "torch" else 3)
    with torch.no_grad():
        weights = PrepackedWeights(weight, bias)
        for _ in range(3):
            torch.testing.assert_close(weights(x).double(), exact[0], rtol=1e-4, atol=1e-4)
        assert len(packed) == (kind == "prepacked")
        pairs = matmul.products(torch.stack((x, x)), torch.stack((weight, weight)))
        torch.testing.assert_close(pairs[1].double() + bias.double(), exact[0], rtol=1e-4, atol=1e-4)


class Linear(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(OUT, WIDTH))

    def forward(self, x):
        return matmul.linear(x, self.weight)


def fake(model, x):
    with FakeTensorMode() as mode:
        return Linear()(mode.from_tensor(x))


@needs_onednn
@pytest.mark.parametrize(
    "trace",
    [
        lambda model, x: torch.jit.trace(model, x, check_trace=False),  # died of oneDNN's product
        lambda model, x: torch.export.export(model, (x,)),
        lambda model, x: torch.compile(model, backend="eager")(x),
        lambda model, x: torch.func.vmap(model)(torch.stack((x, x))),
        fake,
    ],
    ids=("jit", "export", "compile", "vmap", "fake"),
)
@pytest.mark.filterwarnings("ignore")
def test_what_is_traced_measures_nothing(trace, monkeypatch):
    monkeypatch.setattr(probe, "figures", None)
    monkeypatch.setenv(probe.VARIABLE, "auto")
    with torch.no_grad():
        trace(Linear(), torch.ones(ROWS, WIDTH))


@needs_onednn
def test_it_is_measured_at_the_first_product_and_then_read(cache, measured, monkeypatch):
    monkeypatch.setenv(probe.VARIABLE, "auto")
    small, x, weight = torch.ones(2, WIDTH), torch.ones(ROWS, WIDTH), torch.ones(OUT, WIDTH)
    matmul.linear(small, weight)
    matmul.linear(x.double(), weight.double())
    with torch.autocast("cpu", torch.bfloat16):
        matmul.linear(x, weight)
    assert not measured and not cache.exists()
    matmul.linear(x, weight)
    matmul.linear(x, weight)
    assert measured == [1]
    first = probe.figures(1)
    assert first.place == next(cache.iterdir()) and [each.name for each in cache.iterdir()] == [first.place.name]
    assert stat.S_IMODE(first.place.stat().st_mode) == 0o600
    forget()
    assert probe.figures(1).speeds == first.speeds and measured == [1]


def damage(text):
    """``damage(text)``: the file as it was becomes what ``text`` makes of it."""
    kept = json.loads(text)

    def changed(**parts):
        return json.dumps({**kept, **parts})

    def with_speed(speed):
        return changed(**{"GFLOP/s": {**kept["GFLOP/s"], "fp32 torch": speed}})

    return {
        "empty": "",
        "cut": text[: len(text) // 2],
        "code": "__import__('os').system('true')",
        "nested": "[" * 10**5,
        "list": "[]",
        "another's": changed(key="0" * 24),
        "no speeds": changed(**{"GFLOP/s": {}}),
        "speeds no table": changed(**{"GFLOP/s": 3}),
        "too few": with_speed([50.0] * (SIZES - 1)),
        "negative": with_speed([-1.0] * SIZES),
        "too fast": with_speed([1e9] * SIZES),
        "no number": with_speed([float("nan")] * SIZES),
        "truth": with_speed([True] * SIZES),
        "words": with_speed(["50"] * SIZES),
        "text": with_speed("5" * SIZES),
        "torch does not run": with_speed([0.0] * SIZES),
    }


@pytest.mark.parametrize("what", damage(json.dumps({"key": "", "GFLOP/s": speeds()})))
def test_damaged_figures_are_measured_again(what, cache, measured):
    path = probe.figures(1).place
    path.write_text(damage(path.read_text())[what])
    forget()
    again = probe.figures(1)
    assert measured == [1, 1] and again.speeds["fp32 torch"] == [62.0] * SIZES
    forget()
    assert probe.figures(1).speeds == again.speeds and measured == [1, 1]


def test_figures_that_others_can_write_are_measured_again(cache, measured):
    probe.figures(1).place.chmod(0o666)
    forget()
    assert stat.S_IMODE(probe.figures(1).place.stat().st_mode) == 0o600 and measured == [1, 1]


def test_figures_that_cannot_be_kept(tmp_path, cache, measured, monkeypatch, caplog):
    (tmp_path / "cache").write_text("a file where the folder would be")
    found = probe.figures(1)
    assert found.place is None and measured == [1] and found is probe.figures(1)
    assert "speeds of products cannot be kept" in caplog.text and "FAIRSEQ_ADAPTIVE_PRODUCTS=onednn" in caplog.text


def test_without_links_the_file_is_renamed(cache, measured, monkeypatch):
    def link(*args):
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", link)
    assert probe.figures(1).place.exists()
    forget()
    probe.figures(1)
    assert measured == [1]


def test_who_keeps_figures_at_once_takes_those_of_the_first(cache):
    key, many = probe._key(1), 12
    start = threading.Barrier(many)

    def keep(number):
        start.wait()
        return probe._keep(speeds(fp32_torch=60.0 + number), cache / f"{key}.json", key)

    with ThreadPoolExecutor(many) as pool:
        found = list(pool.map(keep, range(many)))
    assert len({json.dumps(each.speeds) for each in found}) == 1
    assert [each.name for each in cache.iterdir()] == [f"{key}.json"]


@pytest.mark.slow
def test_two_processes_choose_alike(tmp_path):
    program = (
        "import fairseq_adaptive.plugin; from fairseq_adaptive.ops import probe; assert not probe._KNOWN; "
        "print(probe.figures(1).speeds)"
    )
    environment = {**os.environ, "FAIRSEQ_ADAPTIVE_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "-c", program]
    both = [subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, cwd=USER_DIR + "/..") for _ in range(2)]
    said = [each.communicate(timeout=120)[0] for each in both]
    assert said[0] == said[1] and said[0].startswith(b"{'fp32 prepacked'")


def test_the_name_says_of_what_the_figures_are(monkeypatch):
    names = [probe._key(1), probe._key(2)]
    for owner, name, value in (
        (native, "processor", lambda: "another"),
        (torch, "__version__", "9.9"),
        (probe, "VERSION", 99),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            names.append(probe._key(1))
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    names.append(probe._key(1))
    assert len(set(names)) == len(names) == 6


def test_each_number_of_threads_has_its_figures(cache, measured):
    assert probe.figures(1) is not probe.figures(2)
    assert measured == [1, 2] and len(list(cache.iterdir())) == 2


def test_measuring_leaves_no_trace(cache, monkeypatch):
    """Real speeds; random numbers, counted operations and autocast are what they would be without."""
    state, start = torch.get_rng_state(), time.process_time()
    with FlopCounterMode(display=False) as counter, torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        found = probe.figures(1)
    assert time.process_time() - start < 4 * probe.LIMIT  # what else this process does counts, too
    assert torch.equal(torch.get_rng_state(), state) and counter.get_total_flops() == 0
    assert torch.get_num_threads() == 1
    assert found.place is not None and set(found.speeds) == set(probe._NAMES)
    for name, each in found.speeds.items():
        assert len(each) == SIZES and all(0 <= speed < 1e5 for speed in each), name
    assert all(found.speeds["fp32 torch"]) and found.training("fp32") > 0.1 and found.training("bf16") > 0.1


def test_a_product_that_would_take_too_long_is_not_run(monkeypatch):
    ran = []

    def calls(*size):
        def slow():
            ran.append(size)
            time.sleep(0.002)

        return {"fp32 torch": slow, "bf16 torch": lambda: None}

    monkeypatch.setattr(probe, "_calls", calls)
    start = time.perf_counter()
    found = probe.measure(2)  # of several threads it is the clock that counts
    torch.set_num_threads(1)
    assert time.perf_counter() - start < 2 * probe.LIMIT
    assert probe.SIZES[2] not in ran and found["fp32 torch"][2] == found["fp32 torch"][1] < 20
    assert found["fp32 onednn"] == [0] * SIZES and min(found["bf16 torch"]) > 50


def test_speed_of_training(forge, monkeypatch):
    """The products of 128 and 512 rows, each by its part of the work: by far the most is the largest one's."""
    forge(fp32_torch=[1.0] * 7 + [100.0], fp32_onednn=[1.0] * 7 + [80.0], bf16_torch=[40.0] * SIZES, bf16_onednn=999)
    figures, rows = probe.figures(1), [(128, 2**16), (512, 2**16), (128, 2**20), (512, 2**20)]
    work = [count * weights for count, weights in rows]
    assert figures.training("bf16") == pytest.approx(40)
    assert figures.training("fp32") == pytest.approx(sum(work) / (sum(work[:3]) + work[3] / 100))
    monkeypatch.setenv(probe.VARIABLE, "onednn")
    assert figures.training("fp32") == pytest.approx(sum(work) / (sum(work[:3]) + work[3] / 80))


def test_info_shows_the_figures(forge, monkeypatch):
    monkeypatch.setenv("FAIRSEQ_ADAPTIVE_BF16", "auto")
    forge(fp32_torch=90.5, fp32_prepacked=[85.0] * 7 + [120.0], bf16_torch=[40.0] * SIZES)
    rows = dict(info.products())
    sizes = [f"{count}x{inner}x{outer}" for count, outer, inner in probe.SIZES]
    assert list(rows) == ["measured", *sizes, "FAIRSEQ_ADAPTIVE_PRODUCTS", "--bf16"]
    assert "1 threads" in rows["measured"] and "no file" in rows["measured"]
    assert rows["1x256x256"].endswith("fp32 runs on torch: small")
    assert rows["512x512x2048"] == (
        "fp32 prepacked 120, onednn 50, torch 90.5; bf16 prepacked 50, onednn 50, torch 40; "
        "fp32 runs on torch, and prepacked where weights are constant"
    )
    assert rows["FAIRSEQ_ADAPTIVE_PRODUCTS"] == "auto"
    assert rows["--bf16"].startswith(
        "trains in fp32, since bf16 gains nothing; products in training: bf16 40, fp32 90 "
    )
    forge(bf16_torch=100)
    assert dict(info.products())["--bf16"].startswith("trains in bf16 autocast; ")
    monkeypatch.setenv(probe.VARIABLE, "torch")
    rows = dict(info.products())
    assert rows["FAIRSEQ_ADAPTIVE_PRODUCTS"] == "torch" and rows["512x512x2048"].endswith("; fp32 runs on torch")

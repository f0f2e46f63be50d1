import importlib.util
import logging

import pytest
import torch

from fairseq_adaptive import info
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.ops import registry

FP32 = torch.float32


@pytest.fixture
def op(monkeypatch):
    """An operation with a kernel for Triton and one for torch; Triton is installed, apex is not."""
    monkeypatch.setattr(registry, "OPS", {})
    monkeypatch.setattr(registry, "_installed", lambda backend: backend != "apex")
    monkeypatch.delenv(registry.VARIABLE, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    registry._load.cache_clear()
    yield registry.Op("sum_of_squares", {"triton": "operator:neg", "torch": "operator:abs"})
    registry._load.cache_clear()


def test_automatic_choice_falls_back(op, caplog):
    assert op.choose("cuda", FP32) == ("triton", "the first choice")
    assert op.choose("cpu", FP32) == ("torch", "triton: it does not run on cpu")
    assert op.choose("cuda", torch.float64) == ("torch", "triton: it has no kernel for float64")
    caplog.set_level(logging.INFO)
    assert [op.implementation(torch.ones(1), FP32)(-3) for _ in range(2)] == [3, 3]
    assert [record.message for record in caplog.records] == [
        "sum_of_squares runs on torch (triton: it does not run on cpu)"
    ]


def test_automatic_choice_says_what_is_not_installed(op, monkeypatch):
    monkeypatch.setattr(registry, "_installed", lambda backend: backend == "torch")
    assert op.choose("cuda", FP32) == ("torch", "triton: triton is not installed")


def test_the_interpreter_runs_only_where_it_is_asked_for(op, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert op.choose("cpu", FP32)[0] == "torch"
    monkeypatch.setenv(registry.VARIABLE, "triton")
    assert op.choose("cpu", FP32) == ("triton", "FAIRSEQ_ADAPTIVE_KERNELS=triton")
    assert op.implementation(torch.ones(1), FP32)(-3) == 3 and op.implementation(torch.ones(1), FP32)(3) == -3


@pytest.mark.parametrize(
    "asked, device, dtype, message",
    [
        ("triton", "cpu", FP32, "sum_of_squares cannot use it: it does not run on cpu"),
        ("triton", "cuda", torch.float64, "sum_of_squares cannot use it: it has no kernel for float64"),
        ("apex", "cuda", FP32, "the module fused_layer_norm_cuda is not installed"),
        ("cuda", "cuda", FP32, "FAIRSEQ_ADAPTIVE_KERNELS=cuda is unknown: choose one of auto, triton, apex, torch"),
    ],
)
def test_explicit_choice_fails_loudly(op, monkeypatch, asked, device, dtype, message):
    monkeypatch.setenv(registry.VARIABLE, asked)
    with pytest.raises(UsageError, match=message):
        op.choose(device, dtype)


def test_explicit_choice(op, monkeypatch):
    monkeypatch.setenv(registry.VARIABLE, "torch")
    assert op.choose("cuda", FP32) == ("torch", "FAIRSEQ_ADAPTIVE_KERNELS=torch")
    monkeypatch.setattr(registry, "_installed", lambda backend: True)
    monkeypatch.setenv(registry.VARIABLE, "apex")
    assert op.choose("cuda", FP32) == ("torch", "there is no kernel for apex")


def test_a_folder_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "no_such_extension").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(registry.EXTENSIONS, "some", "no_such_extension")
    assert importlib.util.find_spec("no_such_extension") is not None and not registry._installed("some")


def test_every_implementation_can_be_imported():
    for op in registry.OPS.values():
        assert list(op.backends)[-1] == "torch"
        for backend in op.backends:
            if registry._installed(backend):
                found = registry._load(op.name, backend, "test")
                assert callable(found) or callable(found.forward) and callable(found.backward)


def test_info_names_every_operation(monkeypatch):
    monkeypatch.delenv(registry.VARIABLE, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    rows = dict(info.operations())
    assert set(rows) == set(registry.OPS)
    assert rows["label_smoothed_cross_entropy"].startswith("cpu: torch (triton: ")
    monkeypatch.setenv(registry.VARIABLE, "triton")
    assert "cpu: error: FAIRSEQ_ADAPTIVE_KERNELS=triton, but" in dict(info.operations())["label_smoothed_cross_entropy"]

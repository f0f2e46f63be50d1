import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

import fairseq_adaptive
from cli.helpers import run
from fairseq_adaptive import compat, info

ROOT = str(Path(fairseq_adaptive.__file__).parent.parent)


def text(rows, name):
    return dict(rows)[name]


def test_report():
    lines = run("python", "-m", "fairseq_adaptive.info", cwd=ROOT).stdout.splitlines()
    starts = [line.split()[0] for line in lines if line.startswith("  ") and line[2] != " "]
    assert {"python", "torch", "fairseq", "cpu", "cuda", "triton", "load_safely", "shared_transformer"} <= set(starts)
    assert any(torch.__version__ in line for line in lines)
    columns = [len(line) - len(line.split(None, 1)[1]) for line in lines if line.startswith("  ") and line[2] != " "]
    assert len(set(columns)) == 1, "the second column is not aligned"
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("suppliers", [["ve-fairseq"], ["fairseq-fixed"], ["fairseq", "ve-fairseq"], []])
def test_names_the_supplier_of_fairseq(suppliers, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: {"fairseq": suppliers * 2})
    monkeypatch.setattr(importlib.metadata, "version", lambda name: f"9.{len(name)}")
    line = text(info.versions(), "fairseq")
    assert all(f"{supplier} 9.{len(supplier)}" in line for supplier in suppliers)
    assert ("keep one" in line) == (len(suppliers) == 2)
    assert ("not installed" in line) == (not suppliers)


def test_every_patch_has_a_line():
    assert [name for name, _ in info.patches()] == compat.applied
    assert all(line.endswith(".") for _, line in info.patches())


def test_architectures():
    rows = info.architectures()
    assert "shared_transformer_tiny" in text(rows, "shared_transformer").split()
    assert "transformer" not in dict(rows)


def test_apex_is_never_imported(tmp_path, monkeypatch):
    # PyPI's apex is not NVIDIA's: its presence says nothing, and its code is not to be run
    (tmp_path / "apex.py").write_text("raise SystemExit('apex was imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert info._apex().startswith("unavailable: NVIDIA apex")


@pytest.mark.parametrize("extension, cuda, word", [(False, True, "not installed"), (True, False, "no CUDA device")])
def test_apex_says_why(extension, cuda, word, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: (extension or None) if name == "fused_layer_norm_cuda" else find_spec(name),
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    assert info._apex().startswith("unavailable") and word in info._apex()


def test_cuda_device_is_named(monkeypatch):
    class Device:
        name, major, minor, total_memory = "Some GPU", 9, 0, 80 * 2**30

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Device)
    assert text(info.devices(), "cuda:0") == "Some GPU, capability 9.0, 80 GiB"


@pytest.mark.parametrize("native", [True, False])
def test_bf16(native, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": native, "amx_bf16": False})
    assert ("bf16 native (avx512_bf16)" in text(info.devices(), "cpu")) == native


def test_without_a_working_fairseq(tmp_path):
    (tmp_path / "fairseq.py").write_text("raise ValueError('mutable default is not allowed')")
    done = run(
        "python",
        "-m",
        "fairseq_adaptive.info",
        cwd=tmp_path,
        check=False,
        env={"PYTHONPATH": os.pathsep.join((str(tmp_path), ROOT))},
    )
    assert done.returncode == 1
    assert "cannot be imported: ValueError: mutable default is not allowed" in done.stdout
    assert done.stderr.startswith("error: fairseq cannot be imported") and "Traceback" not in done.stderr
    assert torch.__version__ in done.stdout


def test_torchaudio_that_cannot_be_imported(monkeypatch, tmp_path):
    """It keeps transformers and peft from being imported, on a machine without CUDA."""
    (tmp_path / "torchaudio").mkdir()
    (tmp_path / "torchaudio" / "__init__.py").write_text("raise OSError('Could not load this library')\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchaudio"]:
        monkeypatch.delitem(sys.modules, name)
    said = text(info.versions(), "torchaudio")
    assert "Could not load this library" in said and said.endswith("pip uninstall torchaudio)")

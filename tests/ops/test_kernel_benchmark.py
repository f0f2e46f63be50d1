"""The benchmark of fused operations, at sizes that only show that it runs."""

import importlib
import json
import logging
import sys
from pathlib import Path

import pytest

from fairseq_adaptive.ops import OPS

SCRIPTS = Path(__file__).parents[2] / "scripts" / "benchmark"


@pytest.fixture
def kernels(monkeypatch):
    """The script, as a module; what it sets for its process is undone."""
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.delenv("FAIRSEQ_ADAPTIVE_KERNELS", raising=False)
    level, known = logging.root.manager.disable, set(sys.modules)
    yield importlib.import_module("kernels")
    logging.disable(level)
    for name in set(sys.modules) - known:
        if str(SCRIPTS) in (getattr(sys.modules[name], "__file__", None) or ""):
            del sys.modules[name]


def test_measures_once_and_prints_the_table(kernels, tmp_path, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["kernels.py", *map(str, arguments)])
        kernels.main()
        return capsys.readouterr().out

    file = tmp_path / "new" / "found.json"
    measure = ("--device", "cpu", "--small", "--no-compile", "--rounds", 1, "--types", "fp32", "bf16", "--output", file)
    shown = run(*measure)
    assert "| `halting_update`, 9 x 8 | fp32 | both |" in shown and shown == run("--table", file)
    with pytest.raises(SystemExit):
        run(*measure)
    assert f"{file} is there already" in capsys.readouterr().err

    found = json.loads(file.read_text())
    assert {row["operation"] for row in found["rows"]} <= set(OPS)
    assert found["command"].endswith(str(file)) and found["versions"]["torch"]
    for row in found["rows"]:
        assert {"naive", "ours"} <= set(row["ways"]) <= {"naive", "ours", "library"}
        assert row["least"] > 0 and row["backend"] == "torch"
        assert row["ways"]["naive"]["naive_over_it"] == 1 and row["ways"]["ours"]["seconds"] > 0
        if row["type"] == "fp32":
            assert row["ways"]["ours"].get("gradient_difference", 0) < 1e-5

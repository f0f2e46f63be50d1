"""The scripts of scripts/benchmark as modules."""

import importlib
import logging
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts" / "benchmark"


@pytest.fixture
def script(monkeypatch):
    """Imports a script by its name; what it sets for its process is undone."""
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.delenv("FAIRSEQ_ADAPTIVE_KERNELS", raising=False)
    level, known = logging.root.manager.disable, set(sys.modules)
    yield importlib.import_module
    logging.disable(level)
    for name in set(sys.modules) - known:
        if str(SCRIPTS) in (getattr(sys.modules[name], "__file__", None) or ""):
            del sys.modules[name]


@pytest.fixture
def call(monkeypatch):
    """Calls a script with some flags."""

    def call_main(module, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
        module.main()

    return call_main

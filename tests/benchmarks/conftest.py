"""The scripts of scripts/benchmark as modules."""

import importlib
import logging
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts" / "benchmark"
NAMES = [path.stem for path in SCRIPTS.glob("*.py")]


@pytest.fixture
def script(monkeypatch):
    """Imports a script by its name; what it sets for its process is undone."""
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.delenv("FAIRSEQ_ADAPTIVE_KERNELS", raising=False)
    level = logging.root.manager.disable
    others = {name: sys.modules.pop(name) for name in NAMES if name in sys.modules}  # such as tests/families.py
    yield importlib.import_module
    logging.disable(level)
    for name in NAMES:
        sys.modules.pop(name, None)
    sys.modules.update(others)


@pytest.fixture
def call(monkeypatch):
    """Calls a script with some flags."""

    def call_main(module, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
        module.main()

    return call_main

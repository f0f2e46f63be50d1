"""A process from which the programs of pages are forked: as that of :mod:`cli.commands`, of which it is one, but it has imported
what most of them import, too. A program."""

import importlib
import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import quick_hydra  # noqa: E402
from cli.commands import listen  # noqa: E402

for name in ("fairseq_adaptive.plugin", "fairseq_adaptive.commands", "matplotlib.pyplot", "sacremoses", "subword_nmt"):
    importlib.import_module(name)
quick_hydra.install(), quick_hydra.prime()
path, *_ = listen("pages")
del sys.path[0]
runpy.run_path(path, run_name="__main__")

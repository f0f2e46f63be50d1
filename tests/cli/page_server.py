"""A process from which the programs of pages are forked: as that of :mod:`cli.commands`, of which it is one, but it has imported
what most of them import, too. A program."""

import importlib
import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from cli.commands import listen  # noqa: E402
from fairseq import options  # noqa: E402
from fairseq.dataclass.utils import convert_namespace_to_omegaconf  # noqa: E402

for name in ("fairseq_adaptive.plugin", "fairseq_adaptive.commands", "matplotlib.pyplot", "sacremoses", "subword_nmt"):
    importlib.import_module(name)
words = ["DATA", "--arch", "shared_transformer_tiny"]  # what hydra learns of its grammar, and inspect of all files
sys.argv = ["fairseq-train", *words]
convert_namespace_to_omegaconf(options.parse_args_and_arch(options.get_training_parser(), words))
path, *_ = listen("pages")
del sys.path[0]
runpy.run_path(path, run_name="__main__")

"""The code of kimiyoung/transformer-xl, loaded from a checkout of it, to be measured beside ours."""

import importlib.util
import sys
from pathlib import Path

import torch

from fairseq_adaptive.errors import UsageError


def load(folder):
    """Return the module ``mem_transformer`` of a checkout.

    Raises:
        UsageError: when there is no such file
    """
    source = Path(folder) / "pytorch" / "mem_transformer.py"
    if not source.is_file():
        raise UsageError(f"--peer must be a checkout of kimiyoung/transformer-xl: there is no {source}")
    sys.path.insert(0, str(source.parent / "utils"))
    version, torch.version.cuda = torch.version.cuda, torch.version.cuda or "0.0"  # it reads one, but does not need it
    try:
        spec = importlib.util.spec_from_file_location("mem_transformer", source)
        code = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(code)
    finally:
        torch.version.cuda = version
        sys.path.pop(0)
    return code

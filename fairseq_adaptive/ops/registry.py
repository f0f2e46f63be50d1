"""Which implementation of an operation runs: ``FAIRSEQ_ADAPTIVE_KERNELS=auto|torch|triton|apex|native``.

``auto``, the default, takes the first one that can run and falls back quietly, with one line in the log. A backend that
is asked for by name must be there and must run in every operation that has a kernel of its kind; the other operations
run on torch.
"""

import functools
import importlib
import importlib.util
import logging
import os
import pkgutil
from dataclasses import dataclass
from typing import Callable, Dict, Optional, Tuple

import torch

from fairseq_adaptive.errors import UsageError

logger = logging.getLogger(__name__)

VARIABLE = "FAIRSEQ_ADAPTIVE_KERNELS"
# PyPI's apex is another package, and NVIDIA's imports without its kernels: only the extension module tells
EXTENSIONS = {"triton": "triton", "apex": "fused_layer_norm_cuda", "torch": "torch", "native": ""}  # native is built
OPS: Dict[str, "Op"] = {}


def requested() -> str:
    """Return what the variable asks for.

    Raises:
        UsageError: for an unknown backend, or one that is not installed
    """
    name = os.environ.get(VARIABLE) or "auto"
    if name != "auto" and name not in EXTENSIONS:
        raise UsageError(f"{VARIABLE}={name} is unknown: choose one of auto, {', '.join(EXTENSIONS)}")
    if name != "auto" and not _installed(name):
        raise UsageError(f"{VARIABLE}={name}, but the module {EXTENSIONS[name]} is not installed")
    return name


@functools.cache
def _installed(backend: str) -> bool:
    if not EXTENSIONS[backend]:
        return True
    spec = importlib.util.find_spec(EXTENSIONS[backend])
    return spec is not None and spec.origin is not None  # a folder of that name is no package


@dataclass(frozen=True)
class Op:
    """An operation and its implementations.

    Args:
        name: of its folder
        backends: name of a backend, the preferred one first, to ``module:function``, or to a module that has a function
            for each pass, which is imported at first use
        dtypes: what its kernels compute in; torch computes in anything
    """

    name: str
    backends: Dict[str, str]
    dtypes: Tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)

    def __post_init__(self):
        OPS[self.name] = self

    def obstacle(self, backend: str, device: str, dtype: torch.dtype, explicit: bool = False) -> Optional[str]:
        """Return why a backend cannot run, or None; Triton's interpreter on a CPU runs only where it is asked for."""
        if not _installed(backend):
            return f"{EXTENSIONS[backend]} is not installed"
        if backend != "torch" and dtype not in self.dtypes:
            return f"it has no kernel for {str(dtype).removeprefix('torch.')}"
        if backend == "native":
            return self._native_obstacle(device)
        interpreted = backend == "triton" and explicit and os.environ.get("TRITON_INTERPRET") == "1"
        if backend != "torch" and device != "cuda" and not interpreted:
            return f"it does not run on {device}"
        return None

    def _native_obstacle(self, device):
        if device != "cpu":
            return f"it does not run on {device}"
        return importlib.import_module(self.backends["native"].partition(":")[0]).obstacle()

    def choose(self, device: str, dtype: torch.dtype) -> Tuple[str, str]:
        """Return the backend that runs and the reason.

        Raises:
            UsageError: when a backend is asked for that cannot run
        """
        asked = requested()
        if asked in self.backends:
            obstacle = self.obstacle(asked, device, dtype, explicit=True)
            if obstacle:
                raise UsageError(f"{VARIABLE}={asked}, but {self.name} cannot use it: {obstacle}")
            return asked, f"{VARIABLE}={asked}"
        if asked != "auto":
            return "torch", f"there is no kernel for {asked}"
        obstacles = {name: self.obstacle(name, device, dtype) for name in self.backends}
        chosen = next(name for name, obstacle in obstacles.items() if obstacle is None)
        return chosen, "; ".join(f"{name}: {why}" for name, why in obstacles.items() if why) or "the first choice"

    def implementation(self, tensor: torch.Tensor, dtype: torch.dtype) -> Callable:
        """Return the function or module that computes on the device of ``tensor`` in ``dtype``; raises as :meth:`choose`."""
        return _load(self.name, *self.choose(tensor.device.type, dtype))


@functools.cache
def _load(op: str, backend: str, reason: str) -> Callable:
    logger.info("%s runs on %s (%s)", op, backend, reason)
    return pkgutil.resolve_name(OPS[op].backends[backend])

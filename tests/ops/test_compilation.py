import os
import subprocess
import sys
from pathlib import Path

import pytest

from fairseq_adaptive.ops import OPS

HERE = Path(__file__).parent
SCRIPTS = HERE.parents[1] / "scripts" / "benchmark"


def test_kernels_compile_for_a_gpu_that_is_not_here(tmp_path):
    """To machine code, which the interpreter of the other tests does not; in a process in which it is off."""
    pytest.importorskip("triton")
    path = os.pathsep.join([str(SCRIPTS), *sys.path])
    env = {**os.environ, "PYTHONPATH": path, "TRITON_CACHE_DIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, HERE / "compile_kernels.py"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    compiled = {line.split()[0] for line in done.stdout.splitlines()}
    assert compiled == {name for name, op in OPS.items() if "triton" in op.backends}

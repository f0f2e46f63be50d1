"""Memory that an operation has freed is there for the next one."""

import platform

import pytest
from cli.helpers import run

from fairseq_adaptive.compat import allocation

ROUNDS = 20
# each round takes and frees 10 pieces of 4 MiB, 10,240 pages; the least of the rounds, since a busy system takes idle pages
PROGRAM = f"""
import resource, torch, fairseq_adaptive.plugin
def round():
    return [torch.ones(1 << 20) for _ in range(10)]
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    round()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
round(), round()
print(min(faults() for _ in range({ROUNDS})))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not the GNU C library")
def test_pages_stay():
    assert int(run("python", "-c", PROGRAM).stdout) < 100
    # whoever has settings of his own keeps them: then all goes back to the system
    assert int(run("python", "-c", PROGRAM, env={"MALLOC_TOP_PAD_": "131072"}).stdout) > 1000


def test_another_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("musl", ""))
    monkeypatch.setattr(allocation.ctypes, "CDLL", None)
    allocation.keep_memory()

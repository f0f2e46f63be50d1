"""What the C library does with memory that torch has freed."""

import ctypes
import os
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h
KEPT = 512 * 2**20  # bytes at the end of the heap that stay
LARGEST = 32 * 2**20  # what is larger comes from the system and goes back to it; glibc takes no higher number
VARIABLES = [f"MALLOC_{name}_" for name in ("TRIM_THRESHOLD", "MMAP_THRESHOLD", "TOP_PAD", "MMAP_MAX")] + [
    "GLIBC_TUNABLES"
]


def keep_memory():
    """On a CPU, memory that an operation has freed is there for the next one.

    glibc gives it back to the system, which must map and clear it anew: up to a fifth of the time of a batch of 8 texts of
    128 words (docs/performance.md). Whoever sets one of ``VARIABLES`` is left alone, and so is any other C library.
    """
    if platform.libc_ver()[0] != "glibc" or any(os.environ.get(name) for name in VARIABLES):
        return
    library = ctypes.CDLL(None)
    library.mallopt(_MMAP_THRESHOLD, LARGEST)
    library.mallopt(_TRIM_THRESHOLD, KEPT)

"""Operations in C: built at first use by whatever compiler is there, and called through ctypes.

The sources have no headers of torch's, so that a build takes seconds and holds for any version of torch. What was built is
kept in the user's cache folder under a name that says of which sources, by which compiler, with which flags and for which
processor: ``$FAIRSEQ_ADAPTIVE_CACHE``, or ``fairseq_adaptive`` in ``$XDG_CACHE_HOME`` or ``~/.cache``. Where that cannot be
written it is built for this process alone. ``$CC`` names another compiler than ``cc``, ``gcc`` or ``clang``.
"""

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import List, Optional

logger = logging.getLogger(__name__)
_FLAGS = "-std=gnu11 -O3 -ffp-contract=fast -fno-math-errno -fno-trapping-math -Wno-psabi -shared -fPIC".split()
_LONGEST = 300  # seconds of a compiler that hangs


class Unavailable(Exception):
    """Why there is no library, in words."""


def _compiler() -> List[str]:
    given = os.environ.get("CC")
    names = [given] if given else ["cc", "gcc", "clang"]
    for command in map(shlex.split, names):
        found = shutil.which(command[0]) if command else None
        if found:
            return [found, *command[1:]]
    raise Unavailable(f"CC={given} is no compiler" if given else "there is no C compiler (cc, gcc or clang)")


def processor() -> str:
    """What tells processors apart that do not run each other's code."""
    lines = []
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        names = ("vendor_id", "cpu family", "model", "model name", "flags", "Features", "CPU part", "CPU implementer")
        for line in file:
            if not line.strip():
                break  # the first of several
            if line.split(":")[0].strip() in names:
                lines.append(line.strip())
    return "\n".join([platform.machine(), platform.processor(), *lines])


def flags() -> List[str]:
    """What a compiler is told; the processor is the one at hand."""
    target = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    return [*_FLAGS, target, *shlex.split(os.environ.get("FAIRSEQ_ADAPTIVE_CFLAGS", ""))]


def cache(folder: str) -> Path:
    """Return a folder of the user's cache, which may not be there yet."""
    given = os.environ.get("FAIRSEQ_ADAPTIVE_CACHE")
    if given:
        return Path(given) / folder
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(home) / "fairseq_adaptive" / folder


def _name(folders: List[Path], compiler: List[str]) -> str:
    digest = hashlib.sha256()
    executable = os.stat(compiler[0])
    told = [*compiler, *flags(), str(executable.st_size), str(executable.st_mtime_ns), sys.platform, processor()]
    for part in told:
        digest.update(part.encode() + b"\0")
    for folder in folders:
        for path in sorted(folder.iterdir()):
            if path.suffix in (".c", ".h"):
                digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return f"{folders[0].name}-{digest.hexdigest()[:24]}.so"


def ours(path: Path) -> bool:
    """Whether nobody else could have put it there."""
    found = os.stat(path)
    return not hasattr(os, "getuid") or (found.st_uid in (os.getuid(), 0) and not found.st_mode & 0o022)


def _compile(source: Path, compiler: List[str], path: Path):
    start = time.perf_counter()
    command = [*compiler, *flags(), str(source), "-o", str(path), "-lm"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_LONGEST)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{compiler[0]} does not run: {error}") from error
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or ["it says nothing"]
        first = next((line for line in said if "error" in line), said[0])
        raise Unavailable(f"{compiler[0]} ended with {done.returncode}: {first.strip()[:200]}")
    os.chmod(path, 0o700)
    logger.info("%s was compiled by %s in %.1f s", source.parent.name, compiler[0], time.perf_counter() - start)


def build(source: Path, *others: Path) -> ctypes.CDLL:
    """Return the library of a C file and of the headers beside it, built where it is not there.

    Several processes may build at once: each renames what it has made to the name that all look for.

    Args:
        others: folders of which it includes headers, too

    Raises:
        Unavailable: where there is no compiler, or what it makes cannot be loaded
    """
    compiler = _compiler()
    try:
        folder, name = cache("native"), _name([source.parent, *others], compiler)
        with contextlib.suppress(OSError):
            if ours(folder / name) and ours(folder):
                return ctypes.CDLL(str(folder / name))
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            scratch = tempfile.mkdtemp(prefix=".part.", dir=folder)
        except OSError:
            scratch = tempfile.mkdtemp(prefix="fairseq_adaptive.")
        try:
            part = Path(scratch) / name
            _compile(source, compiler, part)
            library = ctypes.CDLL(str(part))  # stays when its file is gone
            with contextlib.suppress(OSError):
                if ours(folder):
                    os.replace(part, folder / name)
            return library
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise Unavailable(str(error)) from error


@functools.cache
def _attempt(load):
    try:
        return load(), None
    except Unavailable as error:
        return None, str(error)


def obstacle(load) -> Optional[str]:
    """Why the library that ``load()`` builds and checks is not there, in words, or None; it is tried once a process."""
    return _attempt(load)[1]

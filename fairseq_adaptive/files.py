"""Files of users: read with one line for what is wrong with them, and written whole or not at all, never over another.

A file or folder that has its name is whole, so that what is there need not be made again.
"""

import contextlib
import json
import os
import sys
import tempfile
from typing import Any, Iterator, List

from fairseq_adaptive.errors import UsageError


def require_new(path) -> str:
    """Return ``path`` as a string.

    Raises:
        UsageError: when something is there already, or its folder is missing
    """
    path = os.fspath(path)
    if os.path.lexists(path):
        raise UsageError(f"{path} exists and is left as it is: name another output, or remove it first")
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise UsageError(f"cannot write {path}: there is no folder {folder}")
    if not os.path.basename(path):
        raise UsageError(f"cannot write {path!r}: it has no name")
    return path


def _cause(error):
    # torch's writer reports a failed write as a RuntimeError in whose context the OSError is
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


@contextlib.contextmanager
def whole_file(path) -> Iterator[str]:
    """Give the name of a new file beside ``path``, with the same ending; in the end it is renamed to ``path``.

    Example:
        >>> with whole_file("page.html") as part, open(part, "w", encoding="utf-8") as file:
        ...     file.write(page)

    Raises:
        UsageError: when ``path`` exists, or nothing can be written: a full disk, for instance
    """
    path = require_new(path)
    folder, name = os.path.split(os.path.abspath(path))
    part = os.path.join(folder, f".{os.getpid()}.part.{name[-200:]}")
    try:
        yield part
        with open(part, "rb") as file:
            os.fsync(file.fileno())  # a delayed write may fail as late as here
        os.rename(part, require_new(path))
    except UsageError:
        raise
    except (OSError, RuntimeError) as error:
        raise _unwritten(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(part)


@contextlib.contextmanager
def whole_folder(path) -> Iterator[str]:
    """Give the name of a new empty folder beside ``path``; in the end it is renamed to ``path``.

    Raises:
        UsageError: when ``path`` exists, or nothing can be written
    """
    path = require_new(os.fspath(path).rstrip("/") or "/")
    try:
        with tempfile.TemporaryDirectory(prefix=".part.", dir=os.path.dirname(os.path.abspath(path))) as scratch:
            made = os.path.join(scratch, "made")
            os.mkdir(made)
            yield made
            os.rename(made, require_new(path))
    except UsageError:
        raise
    except (OSError, RuntimeError) as error:
        raise _unwritten(path, error) from error


def _unwritten(path, error):
    cause = _cause(error)
    if cause is None:
        raise error
    return UsageError(f"cannot write {path}: {cause.strerror or cause}; nothing of it was left there")


def read_text(path) -> str:
    """The text of a UTF-8 file, or with ``-`` of the standard input; line ends stay as they are.

    Raises:
        UsageError: when it cannot be read, or is of another encoding
    """
    try:
        if os.fspath(path) == "-":
            if sys.stdin is None or sys.stdin.closed:
                raise UsageError("the standard input is closed: name a file with --input")
            data = sys.stdin.buffer.read() if hasattr(sys.stdin, "buffer") else sys.stdin.read().encode()
        else:
            with open(path, "rb") as file:
                data = file.read()
        return data.decode("utf-8")
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text (byte {error.start})") from None


def read_lines(path) -> List[str]:
    """The lines of a text, which end with a line feed (and a carriage return before it) and with nothing else.

    Raises:
        UsageError: as :func:`read_text`
    """
    lines = read_text(path).split("\n")
    if not lines[-1]:
        del lines[-1]
    return [line.removesuffix("\r") for line in lines]


def read_json(path, kind: type = dict) -> Any:
    """What a JSON file holds.

    Args:
        path: UTF-8
        kind: dict for an object, list for an array

    Raises:
        UsageError: when it cannot be read, is no JSON, or holds something else
    """
    try:
        content = json.loads(read_text(path))
    except UsageError:
        raise
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is cut short, damaged or no JSON: {error}") from None
    if not isinstance(content, kind):
        raise UsageError(f"{path} is no JSON {'object' if kind is dict else 'array'}")
    return content

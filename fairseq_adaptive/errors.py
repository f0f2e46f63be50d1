"""What a user can put right is told in one line."""

import os
import sys
import traceback
from typing import Optional

from fairseq_adaptive.printable import printable


class UsageError(ValueError):
    """A mistake in flags, data or checkpoints. The message says what was wrong and what would be right."""

    def __str__(self):
        # messages quote labels, words and names of files, which must not control the terminal
        return "\n".join(printable(line) for line in super().__str__().split("\n"))


# packages whose errors are explained; and those of which they may be made, as open() and torch.load are
_OWN = {"fairseq", "fairseq_cli", "fairseq_adaptive"}
_BELOW = {*sys.stdlib_module_names, "numpy", "torch", "omegaconf", "hydra"}


def _is_own(trace, own) -> bool:
    """Whether what was raised comes from fairseq or from here, and not from code of a user that they call."""
    for frame, _ in reversed(list(traceback.walk_tb(trace))):
        names = frame.f_globals
        package = (names.get("__package__") or names.get("__name__") or "").partition(".")[0]
        if package in own:
            return True
        if package not in _BELOW:
            return False
    return False


def _find(error, own):
    """The error that explains this one: itself, or that because of which own code raised it."""
    while error is not None:
        if isinstance(error, UsageError):
            return error
        if not _is_own(error.__traceback__, own):
            return None
        if isinstance(error, FileNotFoundError):
            return error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


def _passes(trace, package):
    """Whether code of a package is among what was running."""
    files = (frame.f_code.co_filename for frame, _ in traceback.walk_tb(trace))
    return any(os.path.basename(os.path.dirname(file)) == package for file in files)


# how messages of fairseq begin that a user can act on, and for which it has no class
_TOLD = (
    "The dataset is empty",
    "sentence at index",
    "Sentences lengths should not exceed",
    "Must specify --max-tokens",
    "Provided Search parameters",
)


def _told(error, own):
    """Whether fairseq itself says what is wrong with flags or data: in its commands, assertions check flags."""
    place = traceback.extract_tb(error.__traceback__)
    in_command = bool(place) and os.path.basename(os.path.dirname(place[-1].filename)) == "fairseq_cli"
    told = str(error).startswith(_TOLD) and _is_own(error.__traceback__, own)
    return told or (isinstance(error, AssertionError) and bool(str(error)) and in_command)


def report_usage_errors(within: Optional[str] = None):
    """Let a command end with one line instead of a traceback when it ends with a :class:`UsageError`.

    So does what fairseq itself says of flags and data, a file that fairseq or this package does not find, and what
    they raise because of either. Errors of a user's own code and of other programs keep their tracebacks. The exit
    status stays 1. Set ``FAIRSEQ_ADAPTIVE_TRACEBACK=1`` for the traceback.

    Args:
        within: package of the command, through which the error must have come (default: this program is one)
    """
    previous, own = sys.excepthook, _OWN if within else {*_OWN, "__main__"}
    if within is not None and "hydra" in sys.modules:
        os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # else hydra prints a traceback and ends, and no hook is asked

    def hook(kind, error, trace):
        cause = None
        if within is None or _passes(trace, within):
            cause = UsageError(error) if _told(error, own) else _find(error, own)
        if cause is None or os.environ.get("FAIRSEQ_ADAPTIVE_TRACEBACK") == "1":
            previous(kind, error, trace)
        elif isinstance(cause, UsageError):
            # a worker of the data loader sends its message behind a traceback
            print(f"error: {str(cause).rpartition('UsageError: ')[2].rstrip()}", file=sys.stderr)
        else:
            place = traceback.extract_tb(cause.__traceback__)[-1]
            print(f"error: {cause} (needed by {place.name} in {os.path.basename(place.filename)})", file=sys.stderr)

    sys.excepthook = hook

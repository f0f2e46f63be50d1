"""What a user can put right is told in one line."""

import os
import sys
import traceback

from fairseq_adaptive.printable import printable


class UsageError(ValueError):
    """A mistake in flags, data or checkpoints. The message says what was wrong and what would be right."""

    def __str__(self):
        # messages quote labels, words and names of files, which must not control the terminal
        return "\n".join(printable(line) for line in super().__str__().split("\n"))


def _find(error, kinds):
    while error is not None:
        if isinstance(error, kinds):
            return error
        error = error.__cause__ or error.__context__
    return None


def report_usage_errors():
    """Let the stock commands end with one line instead of a traceback when the cause is a :class:`UsageError`.

    So ends a missing file, too. The exit status stays 1. Set ``FAIRSEQ_ADAPTIVE_TRACEBACK=1`` for the traceback.
    """
    previous = sys.excepthook

    def hook(kind, error, trace):
        cause = _find(error, (UsageError, FileNotFoundError))
        if str(error).startswith("The dataset is empty"):  # fairseq has no class for it
            cause = UsageError(error)
        if cause is None or os.environ.get("FAIRSEQ_ADAPTIVE_TRACEBACK") == "1":
            previous(kind, error, trace)
        elif isinstance(cause, UsageError):
            # a worker of the data loader sends its message behind a traceback
            print(f"error: {str(cause).rpartition('UsageError: ')[2].rstrip()}", file=sys.stderr)
        else:
            place = traceback.extract_tb(cause.__traceback__)[-1]
            print(f"error: {cause} (needed by {place.name} in {os.path.basename(place.filename)})", file=sys.stderr)

    sys.excepthook = hook

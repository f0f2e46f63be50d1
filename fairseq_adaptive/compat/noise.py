"""What fairseq and its libraries say at the start of a program that no user can act on."""

import contextlib
import logging
import sys
import warnings

# how messages begin, and why they are nobody's business here
_MESSAGES = (
    r"hydra\.experimental\.\w+\(\) is no longer experimental",  # fairseq's calls of hydra: these and the next four
    r"\s*The version_base parameter is not specified",
    r"In 'config': Usage of deprecated keyword in package header",
    r"\s*'config' is validated against ConfigStore schema",
    r"\s*The strict flag in the compose API is deprecated",
    r"'pin_memory' argument is set as true but no accelerator",  # fairseq always sets it
    r"`torch\.cuda\.amp\.\w+\(args\.\.\.\)` is deprecated",  # so fairseq calls them
    r"torch\.cuda\.amp\.GradScaler is enabled, but CUDA is not available",  # --bf16 on a CPU scales nothing
    r"CUDA is not available or torch_xla is imported",  # "Disabling autocast": CUDA's; ours is on
)


def silence_warnings():
    """Deprecations of what fairseq calls, and warnings of CUDA's autocast on a CPU, where ours is on, are not printed.

    Python's ``-W`` and ``PYTHONWARNINGS`` bring them back.
    """
    if sys.warnoptions:
        return False
    for message in _MESSAGES:
        warnings.filterwarnings("ignore", message=message)
    return True


@contextlib.contextmanager
def as_it_was():
    """The log of a program that has set up none stays so while fairseq is imported: one of its models
    (``wav2vec2_classification``) lets the debugging messages of every library through, as in a notebook those of
    matplotlib about all fonts."""
    root = logging.getLogger()
    if root.handlers:
        yield
        return
    handler = logging.NullHandler()  # with which logging.basicConfig does nothing
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)

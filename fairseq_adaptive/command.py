"""What our own commands have in common: how they end, where they compute, and whether they colour what they print."""

import argparse
import os
import sys

from fairseq_adaptive.errors import UsageError, report_usage_errors


def run(main) -> None:
    """Run a command; a :class:`UsageError` ends it with one line.

    A reader that went away (``| head``) ends it without a word, a refusal of the system with one line. What the
    terminal's encoding lacks is written as an escape.

    Args:
        main: the function

    Raises:
        UsageError: when a file cannot be read or written
    """
    report_usage_errors()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes once more when it ends
        sys.exit(141)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        if error.errno is None:  # fairseq's own: it says what is missing
            raise UsageError(str(error)) from error
        what = error.filename or "the output"
        raise UsageError(f"cannot read or write {what}: {error.strerror}") from error


def device(text: str) -> str:
    """The name of a device that is here, for ``type=`` of a flag.

    Raises:
        argparse.ArgumentTypeError: when there is none
    """
    import torch  # only here: --help of a command does without

    try:
        found = torch.device(text)
        if found.type == "meta":
            raise RuntimeError("it computes nothing")
        torch.empty(1, device=found)
    except (AssertionError, NotImplementedError, RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
        raise argparse.ArgumentTypeError(f"there is no device {text!r} here ({reason}): use cpu or cuda") from None
    return str(found)


def wants_colour(choice: str) -> bool:
    """Whether to print colours: ``always``, ``never``, or with ``auto`` where the output is a terminal."""
    return choice == "always" or choice == "auto" and sys.stdout is not None and sys.stdout.isatty()

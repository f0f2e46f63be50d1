"""What is under way, on a terminal."""

import sys


def progress(steps, what: str, total=None, unit: str = "it"):
    """``steps``, with a bar of tqdm in front of the user while they are gone through; nothing where stderr is no terminal.

    Args:
        steps: any iterable
        what: is done, a word or two in front of the bar
        total: how many steps there are (default: its length, where it has one)
        unit: of a step
    """
    from tqdm import tqdm

    return tqdm(steps, what, total, leave=False, disable=None, dynamic_ncols=True, unit=unit)


def say(text: str) -> None:
    """Print a line at once, above the bar where there is one."""
    from tqdm import tqdm

    tqdm.write(text)
    sys.stdout.flush()

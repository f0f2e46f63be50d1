"""What every picture needs."""

import logging

from fairseq_adaptive.errors import UsageError


def pyplot():
    """matplotlib's pyplot, which draws to files here.

    Raises:
        UsageError: when matplotlib is not installed
    """
    for name in ("matplotlib", "PIL"):  # fairseq lets every library log all it can
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        import matplotlib
    except ImportError as error:
        raise UsageError("pictures need matplotlib: pip install 'fairseq_adaptive[plots]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt

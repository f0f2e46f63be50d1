"""What every picture needs."""

import logging
import os

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.files import require_new, whole_file


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


def require_picture(path) -> str:
    """Return ``path``; to be asked before the work whose picture it is to be.

    Raises:
        UsageError: when something is there already, its folder is missing, matplotlib cannot draw what the ending says,
            or is not installed
    """
    path = require_new(path)
    pyplot()
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    kinds = FigureCanvasAgg.get_supported_filetypes()
    if os.path.splitext(path)[1].lower()[1:] not in kinds:
        raise UsageError(f"{path} is no name of a picture: end it in .png, or one of {', '.join(sorted(kinds))}")
    return path


def save_figure(figure, path, **options) -> None:
    """Write a figure of matplotlib to a new file and close it.

    Args:
        figure: of :func:`pyplot`
        path: its ending is the format
        options: of ``savefig``

    Raises:
        UsageError: when the file is there already or cannot be written
    """
    try:
        with whole_file(path) as part:
            figure.savefig(part, **options)
    finally:
        pyplot().close(figure)

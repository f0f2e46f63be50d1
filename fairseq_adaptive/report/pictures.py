"""What every picture needs."""

import logging
import os

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.files import require_new, whole_file
from fairseq_adaptive.report.shading import ramp


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


def colormap():
    """The ramp of :mod:`~fairseq_adaptive.report.shading` for maps of matplotlib; what is masked is white."""
    from matplotlib.colors import ListedColormap

    return ListedColormap([ramp(step / 255) for step in range(256)], "depth").with_extremes(bad="white")


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


def require_animation(path) -> str:
    """As :func:`require_picture`, for what ends in .gif."""
    path = require_new(path)
    if not path.lower().endswith(".gif"):
        raise UsageError(f"{path} is no name of an animation: end it in .gif")
    pyplot()
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

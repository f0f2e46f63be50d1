"""How a search came about: the probability of each kind of each block over the updates, as a map and as an animation."""

import re
from pathlib import Path
from typing import Dict, NamedTuple

import numpy as np

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.files import whole_file
from fairseq_adaptive.modules.transformer_xl.layout import format_layout
from fairseq_adaptive.modules.transformer_xl.supernet_block import KINDS
from fairseq_adaptive.progress import progress
from fairseq_adaptive.report.pictures import colormap, pyplot, save_figure

NAMES = ("attention", "feed-forward", "identity")  # of KINDS
FRAME, REST = 125, 3000  # milliseconds of a frame of an animation, and of the last one
# adaptive_compute_loss says of which policy they are
_SCALAR = re.compile(r"(?:search_)?(?:block_(\d+)_([afi])|temperature)")
_NUMBER = re.compile(r"\b(?:search_)?(?:block_(\d+)_([afi])|temperature)\b\W{1,4}([0-9.e+-]+)")
_UPDATES = re.compile(r"\bnum_updates\b\W{1,4}([0-9]+)")


class Course(NamedTuple):
    """What was logged of a search.

    Attributes:
        updates: their numbers ``[U]``
        probabilities: ``[U, N, 3]``, kinds as in ``KINDS``
        temperatures: of the Gumbel-softmax ``[U]``, NaN where none was logged
    """

    updates: np.ndarray
    probabilities: np.ndarray
    temperatures: np.ndarray

    def layout(self, moment: int = -1) -> str:
        """The layout of the most probable kinds, as ``--layout`` takes it; ``identities only`` where none is left."""
        kinds = (KINDS[kind] for kind in self.probabilities[moment].argmax(-1))
        kept = "".join(kind for kind in kinds if kind != "i")
        return format_layout(kept) if kept else "identities only"


def _course(found: Dict[int, Dict], where) -> Course:
    """From what each update has of ``(block, kind)``, and of ``None``, the temperature."""
    blocks = 1 + max((key[0] for values in found.values() for key in values if key), default=-1)
    if not blocks:
        raise UsageError(
            f"{where} has no probabilities of blocks: give that of a search with --criterion "
            "architecture_entropy_loss and a small --log-interval"
        )
    whole = [(block, kind) for block in range(blocks) for kind in KINDS]
    updates = sorted(update for update, values in found.items() if all(key in values for key in whole))
    course = [[[found[update][block, kind] for kind in KINDS] for block in range(blocks)] for update in updates]
    return Course(
        np.array(updates), np.array(course), np.array([found[update].get(None, np.nan) for update in updates])
    )


def read_course(source) -> Course:
    """The course of a search from ``--tensorboard-logdir`` of ``fairseq-train``, a folder, or from its log, a file.

    Raises:
        UsageError: when there is none in it, or neither of them is there
    """
    if Path(source).is_dir():
        return read_scalars(source)
    if not Path(source).is_file():
        raise UsageError(f"{source} is missing: name the log of a search, or its --tensorboard-logdir")
    return read_probabilities(source)


def read_scalars(folder) -> Course:
    """The course of a search from what ``--tensorboard-logdir`` of ``fairseq-train`` has.

    Raises:
        UsageError: when it has none, and where tensorboard is not installed
    """
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError as error:
        raise UsageError(
            "--tensorboard needs the package of that name: pip install tensorboard, or give the log of the "
            "training with --log"
        ) from error
    if not (Path(folder) / "train_inner").is_dir():  # where fairseq keeps what it logs every --log-interval
        return _course({}, folder)
    events = EventAccumulator(str(Path(folder) / "train_inner"), size_guidance={"scalars": 0}).Reload()
    found: Dict[int, Dict] = {}
    for name in events.Tags()["scalars"]:
        match = _SCALAR.fullmatch(name)
        for event in events.Scalars(name) if match else ():
            found.setdefault(event.step, {})[_key(*match.groups())] = event.value
    return _course(found, folder)


def read_probabilities(log) -> Course:
    """The course of a search from the log of ``fairseq-train``, in any ``--log-format``, where there are no scalars.

    Raises:
        UsageError: when the log has no such lines
    """
    course = {}
    for line in Path(log).read_text(encoding="utf-8", errors="replace").splitlines():
        updates = _UPDATES.search(line)
        found = {_key(block, kind): float(value) for block, kind, value in _NUMBER.findall(line)}
        if updates and found and "train_inner" in line:  # other lines are means over a whole epoch
            course[int(updates[1])] = found
    return _course(course, log)


def _key(block, kind):
    return (int(block), kind) if kind else None


class _Map:
    """The figure: a panel for each kind, blocks downwards, and below them the temperature; drawn up to any moment."""

    def __init__(self, course: Course):
        self.course, updates, blocks = course, course.updates, course.probabilities.shape[1]
        plt = pyplot()
        warm = np.isfinite(course.temperatures).any()
        height = max(2.0, 0.22 * blocks)
        self.figure = plt.figure(figsize=(11, height + 1.2 + 1.4 * warm), layout="constrained")
        grid = self.figure.add_gridspec(1 + warm, 3, height_ratios=[height, 1.0][: 1 + warm])
        half = np.diff(updates).min() / 2 if len(updates) > 1 else 0.5
        between = (updates[1:] + updates[:-1]) / 2
        edges = np.concatenate(([updates[0] - half], between, [updates[-1] + half]))
        self.panels, self._maps = [], []
        for column, name in enumerate(NAMES):
            panel = self.figure.add_subplot(grid[0, column], sharey=self.panels[0] if self.panels else None)
            values = course.probabilities[:, :, column].T
            mesh = panel.pcolormesh(edges, np.arange(blocks + 1) - 0.5, values, vmin=0, vmax=1, cmap=colormap())
            panel.set(title=name, xlabel="updates", xlim=(edges[0], edges[-1]))
            panel.tick_params(labelleft=not column)
            self.panels.append(panel)
            self._maps.append(mesh)
        step = 1 if blocks <= 32 else 4
        self.panels[0].set(ylabel="block", yticks=range(0, blocks, step), ylim=(blocks - 0.5, -0.5))
        self.figure.colorbar(mesh, ax=self.panels, label="probability")
        self.line = None
        if warm:
            panel = self.figure.add_subplot(grid[1, :])
            (self.line,) = panel.plot(updates, course.temperatures, color="0.3")
            panel.set(xlabel="updates", ylabel="temperature", xlim=(edges[0], edges[-1]), ylim=(0, None))
            self.panels.append(panel)
        self.draw(len(updates) - 1)

    def draw(self, moment: int) -> None:
        later = np.arange(len(self.course.updates)) > moment
        for column, mesh in enumerate(self._maps):
            values = self.course.probabilities[:, :, column].T
            mesh.set_array(np.ma.masked_where(np.broadcast_to(later, values.shape), values))
        if self.line is not None:
            self.line.set_ydata(np.where(later, np.nan, self.course.temperatures))
        self.figure.suptitle(f"{self.course.updates[moment]} updates: --layout {self.course.layout(moment)}")


def course_figure(course: Course):
    """A figure of matplotlib: the map of a search, with the found layout and the temperature, where it was logged."""
    return _Map(course).figure


def plot_course(course: Course, path) -> None:
    """Draw :func:`course_figure` as a PNG or what else the ending says.

    Raises:
        UsageError: when the file is there already, or matplotlib is not installed
    """
    save_figure(course_figure(course), path, dpi=110)


def animate_course(course: Course, path, frames: int = 60) -> None:
    """Draw the map as it grows, an animated GIF with the same axes, which rests at its end for three seconds.

    Args:
        course: of the search
        path: of the GIF; must not exist
        frames: at most so many moments

    Raises:
        UsageError: as :func:`plot_course`
    """
    from PIL import Image

    count = len(course.updates)
    shown = np.unique(np.linspace(0, count - 1, min(frames, count)).round().astype(int))
    drawn, pictures = _Map(course), []
    drawn.figure.set_dpi(80)
    drawn.figure.canvas.draw()
    drawn.figure.set_layout_engine("none")  # which has placed the axes, and takes longest
    for moment in progress(shown, "frames"):
        drawn.draw(moment)
        drawn.figure.canvas.draw()
        pixels = Image.fromarray(np.asarray(drawn.figure.canvas.buffer_rgba()).copy())
        pictures.append(pixels.convert("RGB").quantize(dither=Image.Dither.NONE))
    pyplot().close(drawn.figure)
    first, *others = pictures
    durations = [FRAME] * len(others) + [REST]
    with whole_file(path) as part:
        first.save(part, save_all=True, append_images=others, duration=durations, loop=0)

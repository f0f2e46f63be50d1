"""Which places of the bank are read, by whom, and how long the tapes are."""

import time
from typing import Iterable, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.printable import printable
from fairseq_adaptive.report.pictures import pyplot, save_figure


class TapeMap(NamedTuple):
    """Sums over the rows of a data set."""

    reads: Tensor  # classes x N, how often an entry was read
    rows: Tensor  # classes, how many rows there were
    lengths: Tensor  # classes x (longest tape + 1), how many rows had a tape of that length
    correct: int
    seconds: float  # of the model alone

    @property
    def mean_length(self) -> float:
        return float((self.lengths.sum(0) * torch.arange(self.lengths.size(1))).sum() / self.rows.sum())


@torch.no_grad()
def read_map(model, batches: Iterable[dict], num_classes: int) -> TapeMap:
    """Run a model over batches and count what its tape reads.

    Args:
        model: in evaluation mode, as for :class:`~fairseq_adaptive.criterions.tape_ponder_loss.TapePonderLoss`
        batches: with ``net_input`` and ``target`` (B)
        num_classes: of the targets

    Raises:
        UsageError: for a model without a tape
    """
    reads = lengths = None
    rows, correct, seconds = torch.zeros(num_classes, dtype=torch.long), 0, 0.0
    for batch in batches:
        start = time.perf_counter()
        logits, extra = model(**batch["net_input"])
        seconds += time.perf_counter() - start
        target, tape = batch["target"].view(-1), extra["tape"]
        if tape is None:
            raise UsageError("the model has no tape: train one with --tape-tokens of 1 or more")
        if reads is None:
            reads = torch.zeros(num_classes, extra["bank_size"] + 1, dtype=torch.long)  # the last: nothing was read
            lengths = torch.zeros(num_classes, extra["max_tokens"] + 1, dtype=torch.long)
        entries = tape.entries.flatten(1)
        entries = entries.where(entries >= 0, extra["bank_size"])
        places = (target.unsqueeze(1) * reads.size(1) + entries).flatten()
        reads.view(-1).scatter_add_(0, places, torch.ones_like(places))
        lengths.index_put_((target, tape.live.sum(1)), torch.ones_like(target), accumulate=True)
        rows += target.bincount(minlength=num_classes)
        correct += int((logits.argmax(1) == target).sum())
    if reads is None:
        raise UsageError("there is nothing to read: the split is empty")
    return TapeMap(reads[:, :-1], rows, lengths, correct, seconds)


def plot_map(
    counted: TapeMap, grid: Tuple[int, int], path: str, names: Optional[list] = None, example: Optional[Tensor] = None
):
    """Write a picture of the share of rows that read each place of the bank, over all and for each class.

    Args:
        counted: from :func:`read_map`
        grid: height and width of the bank
        path: PNG to write
        names: of the classes
        example: classes x H x W, an image of each class, which shows through its map
    """
    figure = map_figure(counted, grid, names, example)
    save_figure(figure, path, dpi=120, bbox_inches="tight")


def map_figure(counted: TapeMap, grid, names=None, example=None, columns: int = 6):
    """What :func:`plot_map` draws: a panel for all rows and one for each class, ``columns`` of them side by side."""
    plt = pyplot()
    from matplotlib.colors import LinearSegmentedColormap

    classes = len(counted.rows)
    maps = [counted.reads.sum(0) / counted.rows.sum()]
    maps += list(counted.reads / counted.rows.clamp(min=1).unsqueeze(1))
    titles = [f"all, tape of {counted.mean_length:.2f}", *map(printable, map(str, names or range(classes)))]
    lines = -(-len(maps) // columns)
    figure, axes = plt.subplots(
        lines,
        min(columns, len(maps)),
        figsize=(1.75 * min(columns, len(maps)) + 1, 1.95 * lines),
        squeeze=False,
        layout="constrained",
    )
    top = max(float(each.max()) for each in maps)
    glow = LinearSegmentedColormap.from_list("read", [(1, 0.55, 0, 0), (1, 0.55, 0, 0.85)])  # the image shows through
    for axis in axes.flat:
        axis.axis("off")
    for place, (each, title, axis) in enumerate(zip(maps, titles, axes.flat)):
        area = (-0.5, grid[1] - 0.5, grid[0] - 0.5, -0.5)  # of the image: the cells of the map lie over it
        image = example[place - 1] if example is not None and place else torch.zeros(1, 1)
        axis.imshow(image, cmap="gray", extent=area, vmin=None if image.numel() > 1 else 0)
        shown = axis.imshow(each.view(grid), vmin=0, vmax=top, cmap=glow, extent=area)
        axis.set_title(title, fontsize=9)
    scale = figure.colorbar(shown, ax=axes.ravel().tolist(), label="share of rows that read it")
    scale.ax.set_facecolor("black")
    return figure

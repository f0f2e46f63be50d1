"""What a search has found: the layout, what it costs beside a Transformer-XL, and how it came about."""

import argparse
import re
import statistics
from pathlib import Path
from typing import Dict, List, Tuple

import numpy as np
import torch
from fairseq.data import Dictionary

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.files import whole_file
from fairseq_adaptive.interop.checkpoint import load_checkpoint, model_options
from fairseq_adaptive.models.segmented_decoder import SegmentedDecoder
from fairseq_adaptive.modules.transformer_xl.block_costs import cost
from fairseq_adaptive.modules.transformer_xl.layout import format_layout
from fairseq_adaptive.modules.transformer_xl.supernet_block import KINDS
from fairseq_adaptive.report.pictures import pyplot, save_figure

_SCALAR = re.compile(r"(?:search_)?block_(\d+)_([afi])")  # adaptive_compute_loss says of which policy they are
_PROBABILITY = re.compile(r"\b(?:search_)?block_(\d+)_([afi])\b\W{1,4}([0-9.e+-]+)")
_UPDATES = re.compile(r"\bnum_updates\b\W{1,4}([0-9]+)")


def load_search(path) -> Tuple[torch.Tensor, argparse.Namespace]:
    """The probabilities ``[N, 3]`` (columns as in ``KINDS``) and the options of the model in a checkpoint.

    Raises:
        UsageError: when it is not a supernet's, or that of one whose architecture was not trained
    """
    state = load_checkpoint(path)
    logits = state["model"].get("decoder.architecture")
    if logits is None:
        raise UsageError(f"{path} is no checkpoint of --arch par_supernet: it has no architecture parameters")
    open_ = (logits == logits[:, :1]).all(dim=1).nonzero().flatten().tolist()
    if open_:
        raise UsageError(
            f"{path} has not chosen among the kinds of {len(open_)} of {len(logits)} blocks: go on with the search until "
            "--architecture-warmup-updates are over"
        )
    return torch.softmax(logits.float(), dim=-1), argparse.Namespace(**model_options(state))


def found_blocks(probabilities: torch.Tensor) -> str:
    """The most probable kind of each block, one letter each, identities included."""
    return "".join(KINDS[kind] for kind in probabilities.argmax(dim=-1).tolist())


def found_layout(blocks: str) -> str:
    """The flag's value for a found model.

    Raises:
        UsageError: when every block is an identity
    """
    kept = blocks.replace("i", "")
    if not kept:
        raise UsageError("the search has found identities only: search with less weight on compute, or for longer")
    return format_layout(kept)


def compare_compute(options, blocks: str, batch: int, segment: int, rounds: int = 5) -> Dict[str, List[float]]:
    """Forward and backward through the blocks of a found model and of a Transformer-XL of as many blocks, in turn.

    Embeddings and output, which are the same in both, are left out.

    Args:
        options: of the supernet
        blocks: of :func:`found_blocks`
        batch, segment: B and T; the memory is full
        rounds: how often each is timed

    Returns:
        ``flops`` and ``seconds`` (medians), each of the found model and of the Transformer-XL
    """
    options = argparse.Namespace(**{**vars(options), "adaptive_softmax_cutoff": None, "tie_adaptive_proj": False})
    length = len(blocks)
    steps = []
    for kinds in blocks.replace("i", ""), ("af" * length)[:length]:
        decoder = SegmentedDecoder(options, Dictionary(), kinds)
        x = torch.randn(batch, segment, options.decoder_embed_dim)
        memory = torch.randn(batch, options.memory_length, options.decoder_embed_dim) if options.memory_length else None
        states = [memory if kind == "a" else None for kind in kinds]

        def step(decoder=decoder, x=x, states=states):
            y, _, _ = decoder.run_blocks(x.clone().requires_grad_(), states)
            y.backward(torch.ones_like(y))

        steps.append(step)
    seconds = [[cost(step, "time", repeats=1) for step in steps] for _ in range(rounds + 1)][1:]
    return {
        "flops": [cost(step, "flops") for step in steps],
        "seconds": [statistics.median(column) for column in zip(*seconds, strict=True)],
    }


def _course(found: Dict[int, Dict], where) -> Tuple[np.ndarray, np.ndarray]:
    """Updates, and the probabilities of each by block and kind, as arrays."""
    if not found:
        raise UsageError(
            f"{where} has no probabilities of blocks: give that of a search with --criterion "
            "architecture_entropy_loss and a small --log-interval"
        )
    blocks = 1 + max(block for values in found.values() for block, _ in values)
    updates = sorted(found)
    course = [[[found[update][block, kind] for kind in KINDS] for block in range(blocks)] for update in updates]
    return np.array(updates), np.array(course)


def read_scalars(folder) -> Tuple[np.ndarray, np.ndarray]:
    """The course of a search from what ``--tensorboard-logdir`` of ``fairseq-train`` has.

    Returns:
        numbers of updates ``[U]`` and probabilities ``[U, N, 3]``

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
            found.setdefault(event.step, {})[int(match[1]), match[2]] = event.value
    return _course(found, folder)


def read_probabilities(log) -> Tuple[np.ndarray, np.ndarray]:
    """The course of a search from the log of ``fairseq-train``, in any ``--log-format``, where there are no scalars.

    Returns:
        numbers of updates ``[U]`` and probabilities ``[U, N, 3]``

    Raises:
        UsageError: when the log has no such lines
    """
    course = {}
    for line in Path(log).read_text(encoding="utf-8", errors="replace").splitlines():
        updates = _UPDATES.search(line)
        found = {(int(block), kind): float(value) for block, kind, value in _PROBABILITY.findall(line)}
        if updates and found and "train_inner" in line:  # other lines are means over a whole epoch
            course[int(updates[1])] = found
    return _course(course, log)


def plot_course(updates, course, path) -> None:
    """Draw the probability of each kind of each block over the updates, as a PNG or what else the ending says."""
    plt = pyplot()
    figure, panels = plt.subplots(1, 3, figsize=(12, 0.25 * course.shape[1] + 2), sharey=True, layout="constrained")
    edges = np.append(updates, updates[-1] + (updates[-1] - updates[-2] if len(updates) > 1 else 1))
    for column, (panel, name) in enumerate(zip(panels, ("attention", "feed-forward", "identity"), strict=True)):
        image = panel.pcolormesh(edges, np.arange(course.shape[1] + 1), course[:, :, column].T, vmin=0, vmax=1)
        panel.set(title=name, xlabel="updates")
    panels[0].set_ylabel("block")
    panels[0].invert_yaxis()
    figure.colorbar(image, ax=panels, label="probability")
    save_figure(figure, path, dpi=120)


def animate_course(updates, course, path, frames: int = 60) -> None:
    """Draw the probabilities of all blocks as an animated GIF, one frame for each of up to ``frames`` moments."""
    plt = pyplot()
    from matplotlib.animation import FuncAnimation, PillowWriter

    shown = np.unique(np.linspace(0, len(updates) - 1, min(frames, len(updates))).round().astype(int))
    figure, panel = plt.subplots(figsize=(0.35 * course.shape[1] + 3, 2.6), layout="constrained")
    image = panel.imshow(course[0].T, vmin=0, vmax=1, aspect="auto")
    panel.set_yticks(range(3), ("attention", "feed-forward", "identity"))
    panel.set_xlabel("block")
    figure.colorbar(image, ax=panel, label="probability")

    def draw(moment):
        image.set_data(course[moment].T)
        panel.set_title(f"{updates[moment]} updates")
        return (image,)

    try:
        with whole_file(path) as part:
            FuncAnimation(figure, draw, frames=shown).save(part, writer=PillowWriter(fps=8))
    finally:
        plt.close(figure)

#!/usr/bin/env python3
"""How time and memory of every family grow with length, depth, batch, vocabulary and workers, beside stock fairseq.

Each point is a process of its own, in which one step is measured: seconds, and the most memory that the process has had
(VmHWM), of which what it has before there is a model is taken off. Of workers each has a batch, so that twice as many do twice
the work. Points stay in --parts, so that a run that was interrupted goes on. A point's time is the least of its rounds.
Exponents are slopes of least squares between logarithms, over the upper half of the sizes. The length of an image is its
patches, the nearest square number.
Weights are random, and so is what tokens skim and where they halt. Attention has no dropout (fairseq's default): with it, torch
on a CPU keeps all weights of attention for the backward pass, and memory grows with the square of the length.
"""

import argparse
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence

import numpy as np
from families import BESIDE, FAMILIES
from record import CLOCKS, machine, said, write_json
from scaling_point import Point, folder_of, write_data

from fairseq_adaptive.command import run
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.files import read_json, require_new, whole_folder
from fairseq_adaptive.ranges import FFN_WIDTH, HEADS, LAYERS, POSITIVE, ROUNDS, THREADS, WIDTH, Parser
from fairseq_adaptive.report.pictures import pyplot, require_picture, save_figure

SIZES = {
    "length": (128, 256, 512, 1024, 2048, 4096),
    "depth": (6, 12, 24, 48),
    "batch": (1, 2, 4, 8, 16, 32),
    "vocabulary": (10000, 30000, 90000, 267000),
    "workers": (1, 2, 4),
}
SMALL = {"length": (36, 64), "depth": (2, 3), "batch": (1, 2), "vocabulary": (40, 80), "workers": (1, 2)}
BASE = {"length": 128, "depth": 6, "batch": 4, "vocabulary": 10000, "workers": 1}
STEPS = ("training", "inference")
WITHOUT_WORDS = ("adatape_parity", "adatape_vit")
FIGURES = {"time": "seconds", "memory": "MiB"}


class Curve(NamedTuple):
    """Of a model, a step and an axis: the point of each size."""

    model: str
    step: str
    axis: str
    points: Dict[int, Point]


def curves(models: Sequence[str], axes: Sequence[str], small: bool) -> List[Curve]:
    """All that is to be measured; many curves share points, and families share stock models."""
    sizes = SMALL if small else SIZES
    base = {axis: sizes[axis][0] for axis in sizes} if small else BASE
    found = []
    for model in dict.fromkeys([*models, *(BESIDE[each] for each in models if each in BESIDE)]):
        for axis in axes:
            for step in STEPS[: 1 if axis == "workers" else 2]:
                if axis != "vocabulary" or model not in WITHOUT_WORDS:
                    points = {size: Point(model, step, **{**base, axis: size}) for size in sizes[axis]}
                    found.append(Curve(model, step, axis, points))
    return found


def exponent(sizes: Sequence[float], values: Sequence[float]) -> Optional[float]:
    """The slope of least squares between logarithms over the upper half of the sizes, two at least; None where there is one."""
    pairs = sorted(pair for pair in zip(sizes, values) if pair[1] > 0)
    if len(pairs) < 2:
        return None
    upper = np.log(pairs[-max(2, len(pairs) - len(pairs) // 2) :])
    return float(np.polyfit(*upper.T, 1)[0])


def series(curve: Curve, found: Dict[Point, Dict], figure: str, clock: str = CLOCKS[0]):
    """Sizes and values of a curve, without the points that were left out; workers wait for each other, by the clock."""
    clock = CLOCKS[0] if curve.axis == "workers" else clock
    pairs = []
    for size, point in curve.points.items():
        measured = found.get(point, {})
        if "seconds" in measured:
            size = point.real_length if curve.axis == "length" else size
            memory = measured["peak_mib"] - measured["start_mib"]
            pairs.append((size, measured["seconds"][clock]["least"] if figure == "time" else memory))
    return [size for size, _ in pairs], [value for _, value in pairs]


def table(all_curves: Sequence[Curve], found: Dict[Point, Dict], clock: str = CLOCKS[0]) -> str:
    """The exponents as Markdown: a row for each model and step, stock models behind."""
    axes = list(dict.fromkeys(curve.axis for curve in all_curves))
    lines = ["| model | step | " + " | ".join(f"{axis}: time | memory" for axis in axes) + " |"]
    lines.append("|---" * (2 + 2 * len(axes)) + "|")
    by_key = {(curve.model, curve.step, curve.axis): curve for curve in all_curves}
    for model, step in dict.fromkeys((curve.model, curve.step) for curve in all_curves):
        cells = []
        for axis in axes:
            curve = by_key.get((model, step, axis))
            slopes = [exponent(*series(curve, found, figure, clock)) for figure in FIGURES] if curve else [None, None]
            cells += ["-" if slope is None else f"{round(slope, 2) + 0:.2f}" for slope in slopes]
        lines.append(f"| {model}{'' if model in FAMILIES else ' (stock)'} | {step} | {' | '.join(cells)} |")
    return "\n".join(lines)


def figure_of(all_curves: Sequence[Curve], found: Dict[Point, Dict], clock: str = CLOCKS[0]):
    """A row for each axis, a column for each step and figure; stock models are dashed."""
    plt = pyplot()
    axes = list(dict.fromkeys(curve.axis for curve in all_curves))
    columns = [(step, figure) for figure in FIGURES for step in STEPS]
    models = list(dict.fromkeys(curve.model for curve in all_curves))
    colours = {model: f"C{number}" for number, model in enumerate(models)}  # matplotlib's own, in turn
    markers = dict(zip(models, itertools.cycle("osv^D*")))
    figure, places = plt.subplots(len(axes), 4, figsize=(16, 3.4 * len(axes)), squeeze=False, layout="constrained")
    for curve in all_curves:
        for (step, kind), place in zip(columns, places[axes.index(curve.axis)]):
            sizes, values = series(curve, found, kind, clock)
            if step == curve.step and sizes:
                stroke = "-" if curve.model in FAMILIES else "--"
                place.plot(
                    sizes, values, stroke, color=colours[curve.model], marker=markers[curve.model], label=curve.model
                )
    for axis, row in zip(axes, places):
        for (step, kind), place in zip(columns, row):
            place.set(xscale="log", yscale="log", xlabel=axis, ylabel=FIGURES[kind], title=f"{step}, {kind}")
            sizes = sorted({size for curve in all_curves if curve.axis == axis for size in curve.points})
            place.set_xticks(sizes, [f"{size:,}" for size in sizes])
            place.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
            place.set_visible(bool(place.get_lines()))  # workers only train
    handles = {
        label: handle for row in places for each in row for handle, label in zip(*each.get_legend_handles_labels())
    }
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=6)
    return figure


def _free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def _resident(process) -> float:
    """GiB that a process has; 0 when it has ended."""
    try:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 2**20


def watched(commands, envs, memory: float, seconds: float) -> Optional[str]:
    """Run processes together; return why they were ended before their end, or None.

    Args:
        memory: GiB that they may have together
        seconds: that they may take

    Raises:
        UsageError: when one of them fails
    """
    processes, end = (
        [subprocess.Popen(words, env=env) for words, env in zip(commands, envs)],
        time.monotonic() + seconds,
    )
    try:
        while any(each.poll() is None for each in processes) and not any(each.poll() for each in processes):
            if sum(map(_resident, processes)) > memory:
                return f"needs more than {memory:g} GiB"
            if time.monotonic() > end:
                return f"takes more than {seconds:g} seconds"
            time.sleep(0.05)
    finally:
        for each in processes:
            if each.poll() is None:
                each.kill()
            each.wait()
    if any(each.returncode == -signal.SIGKILL for each in processes):
        return "the system ended it"  # memory ran out
    status = next((each.returncode for each in processes if each.returncode), 0)
    if status:
        raise UsageError(f"a point ended with status {status} (see above): the same command goes on from there")
    return None


def measure(point: Point, part: Path, args) -> Optional[str]:
    """Measure a point into a file; return why there is none, or None."""
    data = folder_of(point, args.parts)
    if not data.exists():
        with whole_folder(data) as folder:
            write_data(point, Path(folder))
    command = [sys.executable, str(Path(__file__).parent / "scaling_point.py"), json.dumps(point._asdict())]
    command += ["--json", str(part), "--data", str(data), "--rounds", str(args.rounds), "--threads", str(args.threads)]
    for name in ("unique_layers", "embed_dim", "ffn_embed_dim", "attention_heads"):
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    env = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    ranks = [{}]
    if point.workers > 1:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(point.workers)}
        ranks = [{**place, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(point.workers)]
    return watched([command] * point.workers, [{**env, **rank} for rank in ranks], args.memory, args.seconds)


def measured_once(point: Point, reason: Optional[str], args) -> Dict:
    """What is there of a point, or is measured now; nothing is where there is a reason."""
    part = args.parts / f"{point.name}.json"
    if not part.exists():
        reason = reason or measure(point, part, args)
        if reason:
            write_json(part, {**point._asdict(), "left_out": reason})
    content = read_json(part)
    seconds = content.get("seconds")
    said = f"{seconds['clock']['median']:.3g} s" if seconds else f"left out: {content['left_out']}"
    print(f"{point.name}: {said}", flush=True)
    return content


def parse():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="new JSON file for all points")
    parser.add_argument("--picture", metavar="PNG", help="new picture of the curves")
    parser.add_argument("--parts", type=Path, default=Path("scaling-parts"), metavar="FOLDER", help="(%(default)s)")
    parser.add_argument("--only", nargs="+", choices=SIZES, default=list(SIZES), metavar="AXIS", help=", ".join(SIZES))
    parser.add_argument("--models", nargs="+", choices=FAMILIES, default=list(FAMILIES), metavar="FAMILY")
    parser.add_argument("--unique-layers", type=LAYERS, default=3, metavar="M", help="(%(default)s)")
    parser.add_argument("--embed-dim", type=WIDTH, default=256, metavar="N", help="(%(default)s)")
    parser.add_argument("--ffn-embed-dim", type=FFN_WIDTH, default=1024, metavar="N", help="(%(default)s)")
    parser.add_argument("--attention-heads", type=HEADS, default=4, metavar="N", help="(%(default)s)")
    parser.add_argument("--rounds", type=ROUNDS, default=3, metavar="N", help="(%(default)s)")
    parser.add_argument("--threads", type=THREADS, default=1, metavar="N", help="of each worker (%(default)s)")
    parser.add_argument(
        "--memory", type=POSITIVE, default=16, metavar="GIB", help="that a point may need (%(default)s)"
    )
    parser.add_argument(
        "--seconds", type=POSITIVE, default=600, metavar="N", help="that a point may take (%(default)s)"
    )
    parser.add_argument(
        "--cpu-time",
        dest="clock",
        action="store_const",
        const=CLOCKS[1],
        default=CLOCKS[0],
        help="seconds of the processor, where others use it too; of workers always those of the clock",
    )
    parser.add_argument("--small", action="store_true", help="sizes that only show that all runs")
    args = parser.parse_args()
    if args.small:
        args.embed_dim, args.ffn_embed_dim, args.attention_heads, args.unique_layers = 16, 32, 2, 1
    return args


def main():
    args = parse()
    require_new(args.output)
    if args.picture:
        require_picture(args.picture)
    found: Dict[Point, Dict] = {}
    all_curves = curves(args.models, args.only, args.small)
    (args.parts / "data").mkdir(parents=True, exist_ok=True)
    for curve in all_curves:
        reason = None  # for which the larger ones are left out, too
        for point in curve.points.values():
            if point not in found:
                found[point] = measured_once(point, reason, args)
            reason = found[point].get("left_out")
    sizes = {name: getattr(args, name) for name in ("unique_layers", "embed_dim", "ffn_embed_dim", "attention_heads")}
    about = {"command": said(), "machine": machine(args.threads), **sizes, "rounds": args.rounds, "clock": args.clock}
    write_json(args.output, {**about, "points": list(found.values())})
    print(table(all_curves, found, args.clock))
    if args.picture:
        save_figure(figure_of(all_curves, found, args.clock), args.picture, dpi=100)


if __name__ == "__main__":
    run(main)

"""One point of scaling.py: a process, or one of several workers, that measures one step of one model at one size."""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import common  # noqa: F401  quiet
import numpy as np
import torch
from adaptive_softmax import resident
from fairseq import options
from fairseq.distributed import utils as distributed
from fairseq.logging import metrics
from fairseq_cli import preprocess
from families import CLASSES, FAMILIES, STOCK
from record import spent, spread, write_json
from time_shares import build, configure

from fairseq_adaptive.command import run
from fairseq_adaptive.modules.layers.prepacked_linear import constant_weights
from fairseq_adaptive.ranges import FFN_WIDTH, HEADS, LAYERS, ROUNDS, THREADS, WIDTH, Parser

PATCH = 4  # of images, as families.py has it


class Point(NamedTuple):
    """What is measured: a model of families.py, a step, and sizes; each worker has a batch of its own."""

    model: str
    step: str
    length: int
    depth: int
    batch: int
    vocabulary: int
    workers: int = 1

    @property
    def data(self) -> str:
        """The kind of its data, of families.py."""
        return {**FAMILIES, **STOCK}[self.model].data

    @property
    def real_length(self) -> int:
        """Images have a square number of patches."""
        return round(self.length**0.5) ** 2 if self.data == "images" else self.length

    @property
    def name(self) -> str:
        return "-".join(map(str, self))


def folder_of(point: Point, parts: Path) -> Path:
    """Where the data of a point are, which points of the same sizes share."""
    return parts / "data" / f"{point.data or 'none'}-{point.real_length}-{point.batch}-{point.vocabulary}"


def write_data(point: Point, folder: Path) -> None:
    """Write two batches of one length for each of 4 workers into an empty folder; words by Zipf's law."""
    rng, count = np.random.default_rng(1), max(8 * point.batch, CLASSES)
    if point.data == "images":
        (folder / "images").mkdir()
        side = PATCH * round(point.length**0.5)
        images = rng.integers(0, 256, (count, side, side, 3)).astype(np.uint8)
        return np.savez(folder / "images" / "train.npz", images=images, labels=np.arange(count) % CLASSES)
    if not point.data:
        return  # it is made as it is read
    shares = 1 / np.arange(1.0, point.vocabulary + 1)
    dictionary, names = folder / "words.txt", [f"w{number}" for number in range(point.vocabulary)]
    dictionary.write_text("".join(f"{name} {point.vocabulary - number}\n" for number, name in enumerate(names)))

    def binarise(to, flags, **texts):
        (folder / to).mkdir(parents=True)
        for ending, rows in texts.items():
            (folder / to / f"train.{ending}").write_text("".join(" ".join(row) + "\n" for row in rows))
        prefix = folder / to / ("train" if len(texts) > 1 else f"train.{next(iter(texts))}")
        command = [*flags.split(), "--trainpref", str(prefix), "--destdir", str(folder / to)]
        preprocess.main(options.get_preprocessing_parser().parse_args(command))

    def sentences():
        drawn = rng.choice(point.vocabulary, (count, point.length), p=shares / shares.sum())
        return [[names[number] for number in row] for row in drawn]

    if point.data == "pairs":
        flags = f"--source-lang src --target-lang tgt --joined-dictionary --srcdict {dictionary}"
        binarise("pairs", flags, src=sentences(), tgt=sentences())
    elif point.data == "text":
        binarise("text", f"--only-source --srcdict {dictionary}", txt=sentences())
    else:
        binarise("labels/input0", f"--only-source --srcdict {dictionary}", input0=sentences())
        binarise("labels/label", "--only-source", label=[[f"class{number % CLASSES}"] for number in range(count)])


def sizes_of(point: Point, args) -> SimpleNamespace:
    """What families.py and time_shares.py read."""
    positions = point.length + 2
    bounded = f" --max-tokens {point.batch * positions}"
    more = {
        "pairs": f"{bounded} --max-source-positions {positions} --max-target-positions {positions}",
        "labels": f"{bounded} --max-positions {positions}",
        "": f" --sequence-length {point.length}",
    }.get(point.data, "")
    return SimpleNamespace(
        layers=point.depth,
        unique_layers=min(args.unique_layers, point.depth),
        embed_dim=args.embed_dim,
        ffn_embed_dim=args.ffn_embed_dim,
        attention_heads=args.attention_heads,
        vocab_size=point.vocabulary,
        tokens=point.batch * point.length,
        length=point.length,
        device="cpu",
        flags=f"--batch-size {point.batch} --required-batch-size-multiple 1 --ddp-backend legacy_ddp --attention-dropout 0{more}",
    )


def measure(cfg, point, args):
    """Write what the first worker finds: seconds of steps, and the most memory that the process has had."""
    trainer, batch = build(cfg)
    training = point.step == "training"

    def step():
        trainer.train_step([batch]) if training else trainer.valid_step(batch)

    with metrics.aggregate(new_root=True):
        if training:
            step()
            found = [spent(step) for _ in range(args.rounds)]
        else:
            with constant_weights():
                step()
                found = [spent(step) for _ in range(args.rounds)]
    if cfg.distributed_training.distributed_rank == 0:
        clock, processor = ([getattr(each, by) for each in found] for by in ("clock", "processor"))
        peak = {
            "tokens": int(batch.get("ntokens", 0)),
            "peak_mib": resident("VmHWM") / 2**20,
            "start_mib": args.start / 2**20,
        }
        write_json(
            args.json, {**point._asdict(), "seconds": {"clock": spread(clock), "processor": spread(processor)}, **peak}
        )


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("point", type=json.loads, help="a point of scaling.py as JSON")
    parser.add_argument("--json", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rounds", type=ROUNDS, default=3)
    parser.add_argument("--threads", type=THREADS, default=1)
    sizes = {"unique-layers": LAYERS, "embed-dim": WIDTH, "ffn-embed-dim": FFN_WIDTH, "attention-heads": HEADS}
    for name, within in sizes.items():
        parser.add_argument(f"--{name}", type=within, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.start, point = resident("VmRSS"), Point(**args.point)
    cfg = configure(point.model, sizes_of(point, args), args.data)
    distributed.call_main(cfg, measure, point=point, args=args)


if __name__ == "__main__":
    run(main)

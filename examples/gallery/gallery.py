#!/usr/bin/env python3
"""Trains, scores and times the cells of the gallery, one after another; run.sh, keys.sh and priors.sh call it.

Every step is a command, which its log begins with. They run in processes that are forked from this one, which has imported
fairseq once. A step that was finished is not done again.
"""

import os
import shlex
import shutil
import time
from pathlib import Path

from cells import CELLS, DEPTHS, FULL, GROUPS, PRIOR_DEPTHS, REPEATS, TRANSLATION, cells_of, training
from results import bleu, collect, line
from steps import begin, chosen, do, seeds_of, write_json

from fairseq_adaptive.command import run
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.files import read_json, whole_file
from fairseq_adaptive.ranges import ROUNDS, Parser, Range

COUNT = Range(int, 1, 1_000_000)
MEASURED = ("--batch-size", "16", "--texts", "64")  # of all reports and dials
TIMED = ("--batch-size", "64", "--texts", "256")  # of the times


def parse(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("group", choices=tuple(GROUPS), help="which cells")
    parser.add_argument("data", help="the OUT folder of a prepare.sh")
    parser.add_argument("out", help="folder for checkpoints, logs and results")
    parser.add_argument("--user-dir", default="fairseq_adaptive", help="the plug-in (default: %(default)s)")
    parser.add_argument("--only", default="", metavar="A,B", help="these cells (default: all)")
    parser.add_argument("--seeds", default="1,2,3", metavar="A,B", help="of the trainings (default: %(default)s)")
    parser.add_argument("--updates", type=COUNT, default=240, metavar="N", help="of each (default: %(default)s)")
    parser.add_argument(
        "--width", type=Range(int, 4, 8192), default=64, metavar="N", help="of all models (default: 64)"
    )
    parser.add_argument("--rounds", type=ROUNDS, default=5, metavar="N", help="how often all are timed (default: 5)")
    parser.add_argument("--minutes", type=COUNT, metavar="N", help="begin no training after so long (default: no end)")
    parser.add_argument("--dry-run", action="store_true", help="print the commands")
    return parser.parse_args(argv)


class Gallery:
    """The runs of one group on one data set.

    Args:
        args: of :func:`parse`

    Raises:
        UsageError: for data that are not there, cells and seeds that are none, and a folder that was begun otherwise
    """

    def __init__(self, args):
        self.args, self.data, self.out, self.began = args, Path(args.data), Path(args.out), time.monotonic()
        self.pair = next((each.name.split(".")[1] for each in sorted(self.data.glob("bin/test.*-*.*.bin"))), None)
        self.task = TRANSLATION if self.pair else "language_model"
        text = self.data / (f"test.{self.pair.partition('-')[2]}" if self.pair else "test.txt")
        for path in (text, *([] if self.pair else [self.data / "bin" / "test.bin"])):
            if not args.dry_run and not path.is_file():
                raise UsageError(
                    f"{path} is missing: make it with prepare.sh of examples/language_model or /translation"
                )
        if self.pair and args.group != "gallery":
            raise UsageError(
                f"{args.group}.sh is for language models: give it data of examples/language_model/prepare.sh"
            )
        if args.width % 4:
            raise UsageError(f"--width {args.width} is no multiple of the 4 heads")
        self.cells, self.seeds = chosen(args.only, cells_of(args.group, self.task), "cell"), seeds_of(args.seeds)
        self.text = text

    def begin(self):
        """Make the folder, or see that it was begun with the same settings.

        Raises:
            UsageError: where it was not
        """
        size = sum(each.stat().st_size for each in self.data.glob("bin/train*.bin"))
        settings = {"task": self.task, "updates": self.args.updates, "width": self.args.width, "data_bytes": size}
        begin(self.out, settings)

    def depths(self, name):
        """To which mean depths a cell is dialled, None: as it was trained."""
        if self.args.group == "priors":
            return PRIOR_DEPTHS
        return (DEPTHS,) if CELLS[name].dialled else (None,)

    def train(self, name, seed):
        """The command that trains a cell."""
        folder = self.out / f"{name}-{seed}"
        words = training(name, self.task, str(folder), seed, self.args.updates, self.args.width)
        pair = self.pair.split("-") if self.pair else None
        languages = ["--task", "translation", "--source-lang", pair[0], "--target-lang", pair[1]] if pair else []
        return ["fairseq-train", str(self.data / "bin"), "--user-dir", self.args.user_dir, *languages, *words]

    def report(self, checkpoints, output, *flags, measured=MEASURED):
        words = ["fairseq-adaptive", "report", *map(str, checkpoints), "--data", str(self.data / "bin"), *measured]
        return [*words, "--device", "cpu", *flags, "--json", str(output)]

    def times(self, checkpoints, output):
        flags = ("--subset", "test", "--no-quality", "--rounds", str(self.args.rounds))
        return self.report(checkpoints, output, *flags, measured=TIMED)

    def dial(self, folder, depth, share):
        words = ["fairseq-adaptive", "dial", str(folder / "checkpoint_last.pt"), "--compute", share]
        return [*words, "--data", str(self.data / "bin"), *MEASURED, "--output", str(folder / f"at-{depth}.pt")]

    def generate(self, checkpoint):
        source, target = self.pair.split("-")
        words = [
            "fairseq-generate",
            str(self.data / "bin"),
            "--user-dir",
            self.args.user_dir,
            "--path",
            str(checkpoint),
        ]
        words += ["--source-lang", source, "--target-lang", target, "--gen-subset", "test", "--batch-size", "64"]
        return [*words, "--beam", "1", "--max-len-a", "1.2", "--max-len-b", "10", "--post-process", "subword_nmt"]

    def plan(self, name, seed):
        """The commands of a run as --dry-run prints them; N stands for a share that is known once the model is trained."""
        cell, folder = CELLS[name], self.out / f"{name}-{seed}"
        if cell.of is None:
            yield self.train(name, seed)
        for depth in self.depths(name):
            last = folder / ("checkpoint_last.pt" if depth is None else f"at-{depth}.pt")
            if depth is not None:
                yield self.report(
                    [folder / "checkpoint_last.pt"], folder / "full.json", "--no-quality", "--rounds", "1"
                )
                yield self.dial(folder, depth, "N")
            yield self.report([last], folder / f"{last.stem}.json", "--subset", "test", "--rounds", "1")
            if self.pair:
                yield self.generate(last)

    def run(self, name, seed):
        """Train and score a cell, as far as that is not done."""
        cell, folder = CELLS[name], self.out / f"{name}-{seed}"
        last = folder / "checkpoint_last.pt"
        folder.mkdir(exist_ok=True)
        if not (folder / "trained.json").exists():
            start = time.monotonic()
            if cell.of is not None:
                self.change(self.out / f"{cell.of}-{seed}", last, cell.changed)
            else:
                do(self.train(name, seed), folder / "train.log")
            seconds = {"seconds": round(time.monotonic() - start, 1)}
            write_json(folder / "trained.json", seconds)
        for depth in self.depths(name):
            if depth is not None:
                last = self.turn(folder, depth)
            scores = folder / f"{last.stem}.json"
            if not scores.exists():
                do(self.report([last], scores, "--subset", "test", "--rounds", "1"), folder / "report.log")
            if self.pair and not (folder / f"{last.stem}.bleu.json").exists():
                do(self.generate(last), folder / f"{last.stem}.out")
                found = bleu(folder / f"{last.stem}.out", self.text, self.pair.partition("-")[2])
                write_json(folder / f"{last.stem}.bleu.json", found)
        if self.args.group == "keys" and name in REPEATS and not (folder / "repeats.json").exists():
            here = os.path.join(os.path.dirname(__file__), "repeats.py")
            words = [str(folder / "checkpoint_last.pt"), "--data", str(self.data / "bin")]
            do(["python3", here, *words, "--output", str(folder / "repeats.json")], folder / "repeats.log")

    def turn(self, folder, depth):
        """The checkpoint at a mean depth: dialled to what that is of the whole model, or as it was trained, where it has no
        such place."""
        last = folder / "checkpoint_last.pt"
        made, full = folder / f"at-{depth}.pt", folder / "full.json"
        if made.exists():
            return made
        if not full.exists():
            do(self.report([last], full, "--no-quality", "--rounds", "1"), folder / "report.log")
        if do(
            self.dial(folder, depth, f"{share_at(depth, read_json(full)):.4f}"),
            folder / f"dial-{depth}.log",
            check=False,
        ):
            with whole_file(made) as part:  # dial-N.log says why
                shutil.copy(last, part)
        return made

    def change(self, source, output, changed):
        """A trained model with other flags."""
        from fairseq_adaptive.interop.checkpoint import load_checkpoint, save_checkpoint

        state = load_checkpoint(source / "checkpoint_last.pt")
        options = state["cfg"]["model"]
        (options if isinstance(options, dict) else vars(options)).update(changed)
        state.pop("last_optimizer_state", None)
        output.unlink(missing_ok=True)
        save_checkpoint(state, output)


def share_at(depth, report) -> float:
    """What a model's multiply-adds are of those of its dense counterpart where its stacks of FULL depths stop at ``depth``."""
    (model,) = report["models"]
    turned = [each["depths"] for each in model["stacks"].values() if len(each["depths"]) == FULL]
    dense = sum(row["counterpart_multiply_adds"] for depths in turned for row in depths)
    return 1 - (1 - depth / FULL) * dense / model["counterpart"]["multiply_adds"]["total"]


def main():
    gallery = Gallery(parse())
    args, runs = gallery.args, [(name, seed) for seed in gallery.seeds for name in gallery.cells]
    for name in gallery.cells:
        if CELLS[name].of not in (None, *gallery.cells):
            raise UsageError(f"{name} takes the trained model of {CELLS[name].of}: name that in --only, too")
    if args.dry_run:
        for name, seed in runs:
            for words in gallery.plan(name, seed):
                print(shlex.join(words))
        return
    gallery.begin()
    print(f"to do: {len(runs)} runs of {args.updates} updates, width {args.width}, {gallery.task}, into {gallery.out}")

    import fairseq_cli.generate  # noqa: F401  imported once, before there are forks
    import fairseq_cli.train  # noqa: F401

    import fairseq_adaptive.plugin  # noqa: F401

    done = []
    for number, (name, seed) in enumerate(runs, 1):
        began = gallery.out / f"{name}-{seed}" / "trained.json"
        late = args.minutes is not None and time.monotonic() - gallery.began > 60 * args.minutes
        if late and not began.exists():
            print(f"{args.minutes} minutes are over: {len(runs) - number + 1} runs are left for the next call")
            break
        start = time.monotonic()
        gallery.run(name, seed)
        done.append((name, seed))
        print(f"{number}/{len(runs)} {line(gallery, name, seed)} [{time.monotonic() - start:.0f} s]", flush=True)
    collect(gallery, done)


if __name__ == "__main__":
    run(main)

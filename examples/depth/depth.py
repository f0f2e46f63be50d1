#!/usr/bin/env python3
"""Trains and scores the models of examples/depth, one after another; run.sh calls it.

Every step is a command, which its log begins with. A step that was finished is not done again.
"""

import json
import shlex
import sys
import time
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional

sys.path.insert(1, str(Path(__file__).parents[1]))  # of the examples
from steps import about, begin, chosen, do, seeds_of, write_json  # noqa: E402

from fairseq_adaptive.command import run  # noqa: E402
from fairseq_adaptive.errors import UsageError  # noqa: E402
from fairseq_adaptive.files import read_json  # noqa: E402
from fairseq_adaptive.ranges import BATCH, Parser, Range  # noqa: E402

FULL = 6  # depths of all models but one
MORE = (12, 20)  # with how many depths looped models are scored besides
QUANTILES = (0.9, 0.98)  # of a token's distribution over depths, at which it halts instead of at the median
PRIOR = json.dumps({"pondernet": {"weight": 0.01, "prior_rate": 1 / 3}})


# tokens halt late at first: deeper sheets come later in training
UNHURRIED = "--halting ut_act --halting-args '{\"bias\": -2}'"


class Row(NamedTuple):
    """A model.

    Attributes:
        title: what it is called in the figure
        flags: of its policies, "" of a model that computes all depths; UPDATES stands for how many the training has
        depths, layers: N depths of M layers
    """

    title: str
    flags: str = ""
    depths: int = FULL
    layers: int = 1


ROWS = {
    "plain-6": Row("plain, 6 layers", layers=FULL),
    "plain-3": Row("plain, 3 layers", depths=3, layers=3),
    "universal": Row("1 layer at 6 depths"),
    "act": Row("ACT of ALBERT", "--halting act"),
    "ut_act": Row("ACT of the Universal Transformer", UNHURRIED),
    "ut_act-rising": Row(
        "the same, its price rising",
        f"""{UNHURRIED} --prices '{{"ut_act": {{"weight": 0.01, "warmup_updates": UPDATES}}}}'""",
    ),
    "pondernet": Row("PonderNet", f"--halting pondernet --prices '{PRIOR}'"),
    "loop_gate": Row("loop gate", "--halting loop_gate"),
    "token_choice": Row("recursions, token choice", "--router token_choice"),
    "tape": Row("tape", "--reader tape"),
    "tape-ut_act": Row("tape + ACT (UT)", f"--reader tape {UNHURRIED}"),
}
LOOPED = ("universal", "act", "ut_act", "ut_act-rising", "pondernet", "loop_gate")  # can be run with more depths
HALTING = ("act", "ut_act", "ut_act-rising", "pondernet", "loop_gate", "token_choice", "tape-ut_act")
DISTRIBUTED = ("pondernet", "loop_gate")  # at any quantile


class Setting(NamedTuple):
    """How a model is scored: with how many depths, and at which exit quantile; None: as it was trained."""

    depths: int
    quantile: Optional[float] = None

    def __str__(self):
        return str(self.depths) + ("" if self.quantile is None else f"@{self.quantile}")


def settings_of(name) -> List[Setting]:
    """How a model is scored, as it was trained first."""
    found = [Setting(depths) for depths in (ROWS[name].depths, *(MORE if name in LOOPED else ()))]
    if name in DISTRIBUTED:
        found += [Setting(ROWS[name].depths, each) for each in QUANTILES] + [
            Setting(each, QUANTILES[-1]) for each in MORE
        ]
    return found


def asked_of(name) -> List[Setting]:
    """At which settings a model is asked how many layers the asked cell gets: with the depths that it was trained with."""
    return [each for each in settings_of(name) if name in HALTING and each.depths == ROWS[name].depths]


def parse(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("data", help="the OUT folder of prepare.sh")
    parser.add_argument("out", help="folder for checkpoints, logs and results")
    parser.add_argument("--user-dir", default="fairseq_adaptive", help="the plug-in (default: %(default)s)")
    parser.add_argument("--only", default="", metavar="A,B", help="these models (default: all)")
    parser.add_argument("--seeds", default="1,2,3", metavar="A,B", help="of the trainings (default: %(default)s)")
    parser.add_argument(
        "--width", type=Range(int, 4, 8192), default=64, metavar="N", help="of all (default: %(default)s)"
    )
    parser.add_argument(
        "--batch-size", type=BATCH, default=64, metavar="N", help="sheets an update (default: %(default)s)"
    )
    parser.add_argument(
        "--minutes",
        type=Range(int, 1, 1_000_000),
        metavar="N",
        help="begin no training after so long (default: no end)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands")
    return parser.parse_args(argv)


class Study:
    """All trainings on one data set.

    Args:
        args: of :func:`parse`

    Raises:
        UsageError: for data that are not there, models and seeds that are none, and a folder that was begun otherwise
    """

    def __init__(self, args):
        self.args, self.data, self.out = args, Path(args.data), Path(args.out)
        self.names, self.seeds = chosen(args.only, ROWS, "model"), seeds_of(args.seeds)
        if args.width % 4:
            raise UsageError(f"--width {args.width} is no multiple of the 4 heads")
        labels = self.data / "text" / "train.label"
        if not labels.is_file():
            raise UsageError(f"{labels} is missing: make it with examples/depth/prepare.sh")
        with open(labels, encoding="utf-8") as lines:
            self.updates = -(-sum(1 for _ in lines) // args.batch_size)
        self.subsets = ["test"]  # of all trained depths, and then one a depth
        while (self.data / "bin" / "input0" / f"test{len(self.subsets)}.bin").is_file():
            self.subsets.append(f"test{len(self.subsets)}")

    def begin(self):
        """Make the folder, or see that it was begun with the same settings.

        Raises:
            UsageError: where it was not
        """
        settings = {"updates": self.updates, "width": self.args.width, "batch_size": self.args.batch_size}
        begin(self.out, settings)

    def train(self, name, seed) -> List[str]:
        """The command that trains a model: once through the sheets, in their order."""
        row, width = ROWS[name], self.args.width
        words = f"fairseq-train {shlex.quote(str(self.data / 'bin'))} --user-dir {shlex.quote(self.args.user_dir)}"
        words += " --task sentence_prediction --num-classes 10 --max-positions 128 --arch transkimmer --no-skimming"
        words += f" --encoder-layers {row.depths} --encoder-unique-layers {row.layers} --encoder-normalize-before"
        words += f" --encoder-embed-dim {width} --encoder-ffn-embed-dim {2 * width} --encoder-attention-heads 4"
        words += (
            f" --dropout 0 --attention-dropout 0 --pooler-dropout 0 {row.flags.replace('UPDATES', str(self.updates))}"
        )
        loss = "adaptive_compute_loss --task-criterion sentence_prediction" if row.flags else "sentence_prediction"
        words += f" --criterion {loss} --optimizer adam --adam-betas (0.9,0.98) --clip-norm 1 --lr 0.003"
        words += (
            f" --lr-scheduler polynomial_decay --total-num-update {self.updates} --warmup-updates {self.updates // 20}"
        )
        words += f" --batch-size {self.args.batch_size} --required-batch-size-multiple 1"
        words += " --max-epoch 1 --no-shuffle --curriculum 1"
        words += (
            f" --seed {seed} --num-workers 0 --log-format simple --log-interval 50 --no-epoch-checkpoints --save-dir"
        )
        return [*shlex.split(words.replace("(0.9,0.98)", "'(0.9,0.98)'")), str(self.out / f"{name}-{seed}")]

    def validate(self, name, seed, setting) -> List[str]:
        """The command that scores it at every nesting depth."""
        words = ["fairseq-validate", str(self.data / "bin"), "--user-dir", self.args.user_dir]
        words += "--task sentence_prediction --criterion sentence_prediction --valid-subset".split()
        words += [",".join(self.subsets), "--path", str(self.out / f"{name}-{seed}" / "checkpoint_last.pt")]
        words += "--batch-size 64 --required-batch-size-multiple 1 --num-workers 0 --log-format json".split()
        changed = {} if setting.depths == ROWS[name].depths else {"encoder_layers": setting.depths}
        changed |= {} if setting.quantile is None else {"exit_quantile": setting.quantile}
        return words + (["--model-overrides", str(changed)] if changed else [])

    def layers(self, name, seed, setting) -> List[str]:
        """The command that asks how many layers each cell got."""
        folder, here = self.out / f"{name}-{seed}", Path(__file__).parent
        words = ["python3", str(here / "layers.py"), str(folder / "checkpoint_last.pt"), str(self.data)]
        words += ["--depths", str(setting.depths)] if setting.depths != ROWS[name].depths else []
        words += ["--quantile", str(setting.quantile)] if setting.quantile is not None else []
        return [*words, "--output", str(folder / f"layers-{setting}.json")]

    def report(self, name, seed) -> List[str]:
        """The command that counts what it spends."""
        folder = self.out / f"{name}-{seed}"
        words = ["fairseq-adaptive", "report", str(folder / "checkpoint_last.pt"), "--data", str(self.data / "bin")]
        words += ["--subset", "test", "--batch-size", "64", "--rounds", "1", "--no-quality", "--device", "cpu"]
        return [*words, "--json", str(folder / "report.json")]

    def steps(self, name, seed):
        """All commands of a model, and of each its log."""
        folder = self.out / f"{name}-{seed}"
        yield self.train(name, seed), folder / "train.log"
        for setting in settings_of(name):
            yield self.validate(name, seed, setting), folder / f"at-{setting}.log"
        yield self.report(name, seed), folder / "report.log"
        for setting in asked_of(name):
            yield self.layers(name, seed, setting), folder / f"layers-{setting}.log"

    def run(self, name, seed):
        """Train and score a model, as far as that is not done."""
        (self.out / f"{name}-{seed}").mkdir(exist_ok=True)
        for words, log in self.steps(name, seed):
            done = log.with_suffix(".done")
            if not done.exists():
                if log.stem != "train":  # a training goes on
                    for path in (log, log.with_suffix(".json")):
                        path.unlink(missing_ok=True)
                start = time.monotonic()
                do(words, log)
                write_json(done, {"seconds": round(time.monotonic() - start, 1)})

    def scores(self, name, seed) -> Dict:
        """What a model has come to."""
        folder = self.out / f"{name}-{seed}"
        (model,) = read_json(folder / "report.json")["models"]
        (stack,) = model["stacks"].values()
        row = {"row": name, "seed": seed, "parameters": model["parameters"]["unique"]}
        row["multiply_adds"] = model["multiply_adds"]["total"] / model["texts"]
        row["mean_depth"] = round(stack["mean_depth"], 3)
        logs = {str(setting): folder / f"at-{setting}.log" for setting in settings_of(name)}
        row["accuracy"] = {setting: said(log, self.subsets, "accuracy") for setting, log in logs.items()}
        row["training_seconds"] = read_json(folder / "train.done")["seconds"]
        if name in HALTING:
            asked = map(str, asked_of(name))
            row["layers"] = {each: read_json(folder / f"layers-{each}.json") for each in asked}
            if "--halting" in ROWS[name].flags:
                row["depth"] = {setting: said(log, self.subsets, "depth") for setting, log in logs.items()}
        return row


def said(log, subsets, value) -> List[float]:
    """What ``fairseq-validate --log-format json`` has said of each subset: the one value that ends so."""
    found = {}
    with open(log, encoding="utf-8") as lines:
        for line in lines:
            head, _, values = line.rpartition(" | ")
            name = head.rpartition(" | ")[2]
            if name in subsets and values.startswith("{"):
                matching = [float(each) for key, each in json.loads(values).items() if key.endswith(f"_{value}")]
                found[name] = matching[0] if len(matching) == 1 else None
    lacking = [name for name in subsets if found.get(name) is None]
    if lacking:
        raise UsageError(f"{log} has no {value} of {lacking[0]}")
    return [found[name] for name in subsets]


def main():
    study = Study(parse())
    args, runs = study.args, [(name, seed) for seed in study.seeds for name in study.names]
    if args.dry_run:
        for name, seed in runs:
            for words, _ in study.steps(name, seed):
                print(shlex.join(words))
        return
    study.begin()
    print(f"to do: {len(runs)} trainings of {study.updates} updates, width {args.width}, into {study.out}")

    import fairseq_cli.train  # noqa: F401  imported once, before there are forks
    import fairseq_cli.validate  # noqa: F401

    import fairseq_adaptive.plugin  # noqa: F401

    began, rows = time.monotonic(), []
    for number, (name, seed) in enumerate(runs, 1):
        begun = (study.out / f"{name}-{seed}" / "train.done").exists()
        if args.minutes is not None and time.monotonic() - began > 60 * args.minutes and not begun:
            print(f"{args.minutes} minutes are over: {len(runs) - number + 1} trainings are left for the next call")
            break
        study.run(name, seed)
        rows.append(study.scores(name, seed))
        own = rows[-1]["accuracy"][str(ROWS[name].depths)]
        print(
            f"{number}/{len(runs)} {name} seed {seed}: {own[0]:.1f}% of {study.subsets[0]}, by depth "
            f"{' '.join(f'{each:.0f}' for each in own[1:])}",
            flush=True,
        )
    output = study.out / "results.json"
    output.unlink(missing_ok=True)  # that of an earlier call
    settings = {"updates": study.updates, "width": args.width, "batch_size": args.batch_size}
    write_json(output, {"group": "depth", **about(), **settings, "runs": rows})
    print("wrote", output)


if __name__ == "__main__":
    run(main)

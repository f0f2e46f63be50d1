#!/usr/bin/env python3
"""Measures a record: trains it with each seed, scores each model on the test set, and says what it took.

A record is a folder with a train.sh, which takes DATA, a new folder for checkpoints, and a seed, and leaves
checkpoint_last.pt there. Its time is that of the whole train.sh: processor time of all its processes, in core-minutes, and
time by the clock. Preparing the data and scoring are not counted. What is finished is not done again.

    python examples/translation/records/measure.py RECORD DATA RAW OUT
"""

import argparse
import importlib.util
import os
import re
import resource
import subprocess
import time
from pathlib import Path

from fairseq_adaptive.command import run
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.files import read_json
from fairseq_adaptive.ranges import THREADS, Parser, Range

HERE = Path(__file__).resolve().parent
RESULT = "result.json"
SEED = Range(int, 1, 1_000_000)


def _benchmark():
    """scripts/benchmark/record.py of this checkout, which knows machines."""
    path = HERE.parents[2] / "scripts" / "benchmark" / "record.py"
    if not path.is_file():
        raise UsageError(f"{path} is missing: measure records in a checkout of the project")
    spec = importlib.util.spec_from_file_location("benchmark_record", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def timed(command, log, env):
    """Run a command whose output goes to a log; its seconds of processors and by the clock.

    Raises:
        UsageError: when it fails
    """
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    with open(log, "w", encoding="utf-8") as file:
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=env).returncode
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if status != 0:
        raise UsageError(f"{' '.join(map(str, command))} ended with status {status}: see {log}")
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return used, time.monotonic() - began


def score(data, raw, folder, log):
    """Tokenised lower-cased BLEU of the last checkpoint, as evaluate-multi30k.sh prints it."""
    command = ["bash", str(HERE.parent / "evaluate-multi30k.sh"), str(data), str(raw), str(folder)]
    timed(command, log, os.environ)
    found = re.search(r"^BLEU\S* = ([0-9.]+)", log.read_text(encoding="utf-8"), re.MULTILINE)
    if found is None:
        raise UsageError(f"there is no BLEU in {log}")
    return float(found[1])


def one_seed(args, benchmark, seed):
    """Train and score with a seed; what was found, also of an earlier call."""
    folder = args.out / str(seed)
    done = args.out / f"{seed}.json"
    if not done.exists():
        if folder.exists():
            raise UsageError(f"{folder} is there, but its training was not finished: remove it")
        others = benchmark.Others()
        command = ["bash", str(args.record / "train.sh"), str(args.data), str(folder), str(seed)]
        env = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
        used, clock = timed(command, args.out / f"{seed}.log", env)
        busy = others.share()
        bleu = score(args.data, args.raw, folder, args.out / f"{seed}.bleu.log")
        row = {"seed": seed, "core_minutes": round(used / 60, 2), "minutes": round(clock / 60, 2), "bleu": bleu}
        benchmark.write_json(done, {**row, "others": busy})
    return read_json(done)


def parse():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path, help="folder with a train.sh")
    parser.add_argument("data", type=Path, help="the OUT folder of prepare-multi30k.sh")
    parser.add_argument("raw", type=Path, help="its input")
    parser.add_argument("out", type=Path, help="folder for checkpoints and logs")
    parser.add_argument("--seeds", type=SEED, nargs="+", default=[1, 2, 3], help="of the trainings (default: 1 2 3)")
    parser.add_argument("--threads", type=THREADS, default=1, help="of each training (default: 1)")
    return parser.parse_args()


def main():
    args = parse()
    for path in (args.record / "train.sh", args.data / "bin" / "dict.de.txt", args.raw / "test.de"):
        if not path.is_file():
            raise UsageError(f"{path} is missing")
    benchmark = _benchmark()
    args.out.mkdir(parents=True, exist_ok=True)
    seeds = []
    for seed in args.seeds:
        seeds.append(one_seed(args, benchmark, seed))
        print("seed {seed}: {bleu:.2f} BLEU in {core_minutes:.1f} core-minutes".format(**seeds[-1]), flush=True)
    command = (args.record / "train.sh").read_text(encoding="utf-8")
    benchmark.write_json(
        args.out / RESULT, {"machine": benchmark.machine(args.threads), "command": command, "seeds": seeds}
    )
    print(f"wrote {args.out / RESULT}: copy it into {args.record} to put the record on the board")


if __name__ == "__main__":
    run(main)

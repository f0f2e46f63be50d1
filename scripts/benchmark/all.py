#!/usr/bin/env python3
"""Runs every benchmark, with the peers that are there, and writes one JSON file for this machine.

Each benchmark leaves a file in --parts; what is there already is kept, so that a run that was interrupted goes on. In the end
all of them become one file, of which tables.py makes the tables of docs/performance.md. A machine on which others compute is
refused, before and after each benchmark.

    python scripts/benchmark/all.py --dry-run
    python scripts/benchmark/all.py --parts PARTS --output docs/benchmarks/MACHINE.json
"""

import argparse
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from record import Others, machine, write_json
from runs import NEEDS, RUNS, SEVERAL, command
from tables import QUIET, busy

from fairseq_adaptive.command import run
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.files import read_json, require_new
from fairseq_adaptive.ranges import THREADS, Parser

HERE = Path(__file__).resolve().parent


def require_quiet(share, when):
    """Raise a UsageError where others take more of the processors than they may."""
    if share is None:
        raise UsageError("this system does not say how busy it is: add --busy to measure all the same")
    if busy(share):
        raise UsageError(
            f"others take {share:.0%} of the processors {when}, and more than {QUIET:.0%} blurs what is measured: wait until "
            "they are done, and give the same command to go on (or add --busy)"
        )


def measure(name, words, part, args):
    """Run a benchmark, which writes its part."""
    if not args.busy:
        others = Others()
        time.sleep(args.watch)
        require_quiet(others.share(), f"before {name}")
    env = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    done = subprocess.run([sys.executable, *words], env=env).returncode
    if done != 0 or not part.exists():
        raise UsageError(f"{name} ended with status {done} (see above): the same command goes on from there")
    if not args.busy:
        try:
            require_quiet(read_json(part).get("others"), f"during {name}, whose figures are thrown away")
        except UsageError:
            part.unlink()
            raise


def require_same(part, words):
    """Raise a UsageError where the part was made by another command."""
    said = read_json(part).get("command", "").split(Path(words[0]).name, 1)[-1].split()
    if said[:-2] != " ".join(words[1:-2]).split():
        raise UsageError(f"{part} was made by another command ({' '.join(said)}): name other --parts, or remove it")


def products(threads):
    """What fairseq-adaptive info prints of products on the CPU: sizes, and GFLOP/s by type and kind."""
    import torch

    from fairseq_adaptive.ops import probe

    torch.set_num_threads(threads)
    return {"sizes": probe.SIZES, "GFLOP/s": probe.figures(threads).speeds}


def parse():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, metavar="FILE", help="new JSON file of this machine")
    parser.add_argument("--parts", type=Path, default=Path("benchmark-parts"), metavar="FOLDER", help="(%(default)s)")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", choices=[each.name for each in RUNS], help="not all of them"
    )
    parser.add_argument("--threads", type=THREADS, default=1, help="of each benchmark (default: 1)")
    parser.add_argument("--busy", action="store_true", help="measure though others compute")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, and run none")
    parser.add_argument("--small", action="store_true", help="sizes that only show that all runs")
    for name, what in NEEDS.items():
        nargs = "+" if name in SEVERAL else None
        parser.add_argument(f"--{name.replace('_', '-')}", nargs=nargs, metavar="PATH", help=what)
    args = parser.parse_args()
    args.watch = 0.2 if args.small else 2.0  # seconds before each benchmark
    if not (args.output or args.dry_run):
        parser.error("the following arguments are required: --output")
    return args


def main():
    args = parse()
    told = {name: [given] if isinstance(given, str) else given for name, given in vars(args).items() if name in NEEDS}
    told["threads"] = [str(args.threads)]
    if args.output:
        require_new(args.output)
    parts = {}
    for each in RUNS:
        if args.only and each.name not in args.only:
            continue
        words, why = command(each, told, args.small)
        if why:
            print(f"{each.name}: {'' if words else 'left out, since '}{why}", flush=True)
        if not words:
            continue
        part = args.parts / f"{each.name}.json"
        words = [str(HERE / words[0]), *words[1:], each.output, str(part)]
        if part.exists():
            require_same(part, words)
            print(f"{each.name}: {part} is there and is kept", flush=True)
        else:
            print(f"{each.name}: {shlex.join(['python', *words])}", flush=True)
            if not args.dry_run:
                args.parts.mkdir(parents=True, exist_ok=True)
                measure(each.name, words, part, args)
        parts[each.name] = part
    if args.dry_run:
        return
    if not parts:
        raise UsageError("there is nothing to run: see the lines above for what is missing")
    benchmarks = {name: read_json(part) for name, part in parts.items()}
    write_json(
        args.output, {"machine": machine(args.threads), "products": products(args.threads), "benchmarks": benchmarks}
    )
    print("wrote", args.output)


if __name__ == "__main__":
    run(main)

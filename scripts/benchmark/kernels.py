#!/usr/bin/env python3
"""Every fused operation beside its definition, run by torch as it stands and by torch.compile, measured in turn.

Speed is the least that an operation must move or multiply over its time, and its share is that of a ceiling of the same
run: the copy of a large tensor on the device, or a large product of matrices of the same type. On a GPU the cache is
emptied before each call. Memory is what is there at most during a call, less what is there before: results, gradients
and what is between.

    python scripts/benchmark/kernels.py --output docs/benchmarks/kernels-NAME.json
    python scripts/benchmark/kernels.py --table docs/benchmarks/kernels-NAME.json
"""

import argparse
import datetime
import os
import statistics
import sys
import time
from pathlib import Path

import common  # noqa: F401  quiet
import torch
from adaptive_softmax import start_memory, used_memory
from kernel_cases import CASES
from record import Others, processor, version, write_json
from tables import kernel_table

from fairseq_adaptive.command import run
from fairseq_adaptive.files import read_json
from fairseq_adaptive.ops import OPS
from fairseq_adaptive.ops.matmul import linear
from fairseq_adaptive.ranges import ROUNDS, Parser

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Clock:
    """Time of a device: of the device itself, or of the processor, where other processes take time too."""

    def __init__(self, device):
        self.device = device
        self._flushed = torch.empty(2**28, dtype=torch.uint8) if device == "cuda" else None

    def time(self, function):
        """Return seconds of a call."""
        if self.device == "cpu":
            start = time.process_time()
            function()
            return time.process_time() - start
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        self._flushed.zero_()
        events[0].record()
        function()
        events[1].record()
        torch.cuda.synchronize()
        return events[0].elapsed_time(events[1]) / 1000

    def median(self, function, rounds):
        return statistics.median(self.time(function) for _ in range(rounds + 1))


def ceilings(clock, dtype, small, rounds):
    """Bytes per second of a copy, and operations per second of a product."""
    large = 2 ** (12 if small else 30 if clock.device == "cuda" else 26)
    x, y = (torch.zeros(large, dtype=torch.uint8) for _ in range(2))
    copied = 2 * large / clock.median(lambda: y.copy_(x), rounds)
    size = 64 if small else 8192 if clock.device == "cuda" else 1024
    a, b = (torch.randn(size, size, dtype=dtype) for _ in range(2))
    return copied, 2 * size**3 / clock.median(lambda: linear(a, b), rounds)


def passes(function, case, backward):
    """A call of the function in a forward pass, or in one and the backward pass of all its results."""
    if not backward:

        def forward():
            with torch.no_grad():
                return function(**case.leaves, **case.others)

        return forward
    leaves = {name: leaf.requires_grad_() for name, leaf in case.leaves.items()}
    gradients = []

    def both():
        outputs = [each for each in function(**leaves, **case.others) if each is not None and each.requires_grad]
        if not gradients:
            gradients.extend(torch.randn_like(each, memory_format=torch.contiguous_format) for each in outputs)
        return [each.detach() for each in outputs], torch.autograd.grad(outputs, list(leaves.values()), gradients)

    return both


def difference(ours, theirs):
    """The largest relative difference of two sets of gradients."""
    pairs = [(a.double(), b.double()) for a, b in zip(ours, theirs)]
    return max(float((a - b).norm() / b.norm().clamp_min(1e-9)) for a, b in pairs)


def measure(name, case, args, clock, backward):
    """Return figures for each way to compute a case: naive, compiled, ours, and that of a library."""
    calls, gradients, figures = {}, {}, {}
    ways = {"naive": case.naive, "compiled": case.naive, "ours": case.fused, "library": case.library}
    for way, function in ways.items():
        if function is None or way == "compiled" and args.no_compile:
            continue
        if way == "compiled":
            torch.compiler.reset()  # after 8 types and sizes of a function it would run uncompiled
            function = torch.compile(function, dynamic=False)
        call = passes(function, case, backward)
        torch.manual_seed(1)
        try:
            result = call()
        except Exception as error:  # there is not always a compiler
            if way != "compiled":
                raise
            print(f"{name}, {case.shape}, compiled: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr)
            continue
        calls[way], gradients[way], figures[way] = call, result[1] if backward else (), {}
        if way != "naive" and backward and not case.others.get("dropout"):
            figures[way]["gradient_difference"] = difference(gradients[way], gradients["naive"])
        del result
    gradients.clear()
    for way, call in calls.items():
        start_memory(args.device)
        kept = call()
        figures[way]["peak_mib"] = used_memory(args.device) / 2**20
        del kept
    rounds = [{way: clock.time(call) for way, call in calls.items()} for _ in range(args.rounds)]
    for way in calls:
        figures[way]["seconds"] = statistics.median(each[way] for each in rounds)
        figures[way]["naive_over_it"] = statistics.median(each["naive"] / each[way] for each in rounds)
    return figures


def describe(args):
    cuda = args.device == "cuda"
    return {
        "command": " ".join(["python", "scripts/benchmark/kernels.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if cuda else processor(),
        "clock": "of the device" if cuda else f"of the processor, {torch.get_num_threads()} threads",
        "rounds": args.rounds,
        "kernels": os.environ.get("FAIRSEQ_ADAPTIVE_KERNELS", "auto"),
        "versions": {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "triton": version("triton"),
        },
    }


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--operations", nargs="+", choices=sorted(OPS), default=list(CASES), help="default: all")
    parser.add_argument("--types", nargs="+", choices=DTYPES, default=list(DTYPES), help="default: all")
    parser.add_argument("--rounds", type=ROUNDS, default=20, help="how often all are measured in turn (default: 20)")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    parser.add_argument("--small", action="store_true", help="sizes that only show that the script runs")
    parser.add_argument("--output", type=Path, metavar="FILE", help="new JSON file for what was found")
    parser.add_argument("--table", type=Path, metavar="FILE", help="measure nothing, print the table of such a file")
    args = parser.parse_args()
    if args.table:
        return print(kernel_table(read_json(args.table)))
    if args.output and args.output.exists():
        parser.error(f"{args.output} is there already")
    missing = [name for name in args.operations if name not in CASES]
    if missing:
        parser.error(f"kernel_cases.py has no case of {', '.join(missing)}")
    others, found = Others(), {**describe(args), "ceilings": {}, "rows": []}
    with torch.device(args.device):
        clock = Clock(args.device)
        for kind in args.types:
            torch.manual_seed(1)
            ceiling = found["ceilings"][kind] = ceilings(clock, DTYPES[kind], args.small, args.rounds)
            for name in args.operations:
                make, on_gpu, on_cpu, small = CASES[name]
                for size in small if args.small else on_gpu if args.device == "cuda" else on_cpu:
                    case = make(DTYPES[kind], *size)
                    backend, _ = OPS[name].choose(args.device, DTYPES[kind])
                    unit = "FLOP/s" if case.arithmetic else "B/s"
                    for passed, least in (("forward", case.forward), ("both", case.both))[: 1 + bool(case.leaves)]:
                        found["rows"].append(
                            {
                                "operation": name,
                                "shape": case.shape,
                                "type": kind,
                                "pass": passed,
                                "backend": backend,
                                "least": least,
                                "unit": unit,
                                "ceiling": ceiling[case.arithmetic],
                                "ways": measure(name, case, args, clock, passed == "both"),
                            }
                        )
    found["others"] = others.share()
    print(kernel_table(found))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.output, found)


if __name__ == "__main__":
    run(main)

#!/usr/bin/env python3
"""What the time of a training step and of an inference step goes into, for every model family: a Markdown table.

A training step is an update of fairseq's trainer with Adam; an inference step is the forward pass of validation,
without gradients, in which halted and skimmed tokens are not computed. Data are generated. The milliseconds are those of steps
without the profiler, medians of --rounds; the shares are of the fastest of as many steps within it, in self time of
operations by the clock, which other processes blur. The products of queries, keys and values are among the matrix
products, and the loss has the output layer's where it is fused. "Python" is what no operation took: a share of the
host's time, and none on a GPU.
"""

import argparse
import contextlib
import re
import tempfile
from collections import Counter
from pathlib import Path

import torch
from common import describe
from fairseq import options, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.logging import metrics
from fairseq.modules import FairseqDropout
from fairseq.trainer import Trainer
from families import add_sizes, flags_of, write_data
from record import CLOCKS, add_json, median, spent
from torch.profiler import ProfilerActivity, profile, record_function

from fairseq_adaptive.command import run
from fairseq_adaptive.modules.layers.dropout import FastDropout
from fairseq_adaptive.modules.layers.prepacked_linear import constant_weights
from fairseq_adaptive.ranges import ROUNDS, THREADS, Parser

# the first that fits an operation, or one that encloses it, has its time
ENCLOSING = {
    "optimiser": r"Optimizer\.|optimizer$|(multiply|clip|reduce)-grads$",
    "loss": r"CrossEntrop|cross_entropy|log_softmax|nll_loss|kl_div|mse_loss",
    "dropout": r"dropout|bernoulli",
    "normalisation": r"layer_norm|LayerNorm",
}
OWN = {
    "matrix products": r"mm$|linear|convolution|conv2d|matmul",
    "softmax, attention": r"softmax|scaled_dot_product|flash_attention|efficient_attention",
    "indexing, copies": r"index|gather|scatter|copy|clone|cat$|stack|embedding|fill|zero|repeat|sort|topk|unique|empty|"
    r"pad",
}
ELEMENTWISE, PYTHON = "elementwise, other", "Python"
COLUMNS = [
    "matrix products",
    "softmax, attention",
    "loss",
    "normalisation",
    "dropout",
    ELEMENTWISE,
    "indexing, copies",
    "optimiser",
    PYTHON,
]


def group_of(event) -> str:
    """The group of a profiler's event."""
    above = event
    while above is not None:
        for group, pattern in ENCLOSING.items():
            if re.search(pattern, above.name):
                return group
        above = above.cpu_parent
    if "::" not in event.name or event.name.startswith("autograd::"):
        return PYTHON
    name = event.name.rstrip("_")
    return next((group for group, pattern in OWN.items() if re.search(pattern, name)), ELEMENTWISE)


def shares_of(prof, device):
    """Return the time, the share of each group, and the operation that took most with its share."""
    groups, operations = Counter(), Counter()
    for event in prof.events():
        spent = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        if spent <= 0 or (device == "cuda" and event.device_type != torch.autograd.DeviceType.CPU):
            continue
        group = group_of(event)
        groups[group] += spent
        if group != PYTHON:
            operations[event.name.removeprefix("aten::")] += spent
    total = sum(groups.values())
    ((first, spent),) = operations.most_common(1)
    return total, {group: groups[group] / total for group in COLUMNS}, (first, spent / total)


def configure(name, args, folder):
    """Return what fairseq makes of a family's flags."""
    device = ["--cpu"] if args.device == "cpu" else []
    fixed = (
        "--optimizer adam --lr 0.0005 --clip-norm 1 --dropout 0.1 --attention-dropout 0.1 --max-update 1000 --seed 1"
    )
    command = [*flags_of(name, args, folder), *fixed.split(), "--num-workers", "0", *device, *args.flags.split()]
    return convert_namespace_to_omegaconf(options.parse_args_and_arch(options.get_training_parser(), command))


def build(cfg):
    """Return a trainer and a batch."""
    torch.manual_seed(1)
    task = tasks.setup_task(cfg.task)
    trainer = Trainer(cfg, task, task.build_model(cfg.model), task.build_criterion(cfg.criterion))
    task.load_dataset("train")
    batches = trainer.get_train_iterator(1).next_epoch_itr(shuffle=True)
    trainer.begin_epoch(1)
    return trainer, next(batches)


def name_dropout():
    """Dropout on a CPU is made of operations that others use, too."""
    for module in FairseqDropout, FastDropout:

        def forward(self, *args, _stock=module.forward, **kwargs):
            with record_function("dropout"):
                return _stock(self, *args, **kwargs)

        module.forward = forward


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sizes(parser)
    parser.add_argument("--steps", nargs="+", choices=("training", "inference"), default=("training", "inference"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=THREADS, default=1)
    parser.add_argument("--rounds", type=ROUNDS, default=3)
    parser.add_argument("--processor-time", action="store_true", help="leave out the time that other processes take")
    parser.add_argument("--flags", default="", help="more of fairseq-train, for all models, such as --bf16")
    add_json(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (args.device == "cuda")]
    record = describe(args)
    name_dropout()
    print("\n| model | step | ms |", " | ".join(COLUMNS), "| first operation |")
    print("|---" * (len(COLUMNS) + 4) + "|")
    with tempfile.TemporaryDirectory() as folder, metrics.aggregate(new_root=True):
        write_data(Path(folder), args)
        for name in args.models:
            trainer, batch = build(configure(name, args, Path(folder)))
            for kind in args.steps:
                step, samples = (trainer.train_step, [batch]) if kind == "training" else (trainer.valid_step, batch)

                def run():
                    step(samples)
                    if args.device == "cuda":
                        torch.cuda.synchronize()

                # weights change in training alone
                with contextlib.nullcontext() if kind == "training" else constant_weights():
                    run()
                    times = [spent(run) for _ in range(args.rounds)]
                    profiles = []
                    for _ in range(args.rounds):
                        with profile(activities=activities) as prof, record_function("step"):
                            run()
                        profiles.append(shares_of(prof, args.device))
                    _, shares, (first, share) = min(profiles, key=lambda each: each[0])
                record.add(kind, {name: times}, shares={name: shares})
                milliseconds = 1000 * median(times, CLOCKS[args.processor_time])
                figures = " | ".join(f"{100 * shares[group]:.0f}%" for group in COLUMNS)
                print(f"| {name} | {kind} | {milliseconds:.0f} | {figures} | {first} {100 * share:.0f}% |", flush=True)
    record.write()


if __name__ == "__main__":
    run(main)

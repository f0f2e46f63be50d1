#!/usr/bin/env python3
"""Trained models of one task side by side: what they log on a split, FLOPs, and sentences/s measured in turn.

Every model is evaluated by the criterion that it was trained with; the time is that of model and criterion.
"""

import argparse
import statistics

import torch
from common import describe
from fairseq import checkpoint_utils, utils
from fairseq.logging import metrics
from record import add_json, in_turn, median, ratios
from torch.utils.flop_counter import FlopCounterMode

import fairseq_adaptive.plugin  # noqa: F401  registers tasks, models and criterions
from fairseq_adaptive.command import run
from fairseq_adaptive.criterions.distillation import without_teacher
from fairseq_adaptive.modules.layers.prepacked_linear import constant_weights
from fairseq_adaptive.ranges import BATCH, COUNT, ROUNDS, Parser


def load(path, args):
    """Return model, criterion and the batches of the split, what is logged of it, and the FLOPs of a sentence."""
    (model,), cfg, task = checkpoint_utils.load_model_ensemble_and_task([path], arg_overrides={"data": args.data})
    task.load_dataset(args.gen_subset)
    batches = task.get_batch_iterator(
        task.dataset(args.gen_subset),
        max_sentences=args.batch_size,
        max_tokens=args.max_tokens,
        seed=1,
        max_positions=utils.resolve_max_positions(task.max_positions(), model.max_positions()),
        ignore_invalid_inputs=True,
    ).next_epoch_itr(shuffle=False)
    criterion = task.build_criterion(
        without_teacher(cfg.criterion)
    ).eval()  # neither its FLOPs nor its time are the model's
    model, batches = model.eval(), list(batches)
    with FlopCounterMode(display=False) as counter, metrics.aggregate(new_root=True) as values:
        task.reduce_metrics([criterion(model, batch)[2] for batch in batches], criterion)
    model.make_generation_fast_()  # as fairseq-generate and predict do; its kernels are not counted, so not before
    size = sum(int(batch["nsentences"]) for batch in batches)
    return model, criterion, batches, values.get_smoothed_values(), counter.get_total_flops() / size


@torch.no_grad()
@constant_weights()  # as fairseq-validate and predict do
def main():
    parser = Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("data", help="the folder that the models were trained on")
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="the first is the one to compare with")
    parser.add_argument("--gen-subset", default="test", metavar="SPLIT")
    parser.add_argument("--batch-size", type=BATCH, default=32)
    parser.add_argument("--max-tokens", type=COUNT)
    parser.add_argument("--rounds", type=ROUNDS, default=5, help="how often all are measured in turn")
    parser.add_argument("--log", nargs="*", default=["accuracy"], metavar="NAME", help="of the values that are logged")
    add_json(parser)
    args = parser.parse_args()
    record = describe(args)

    runs = [load(path, args) for path in args.checkpoints]

    def evaluate(model, criterion, batches):
        for batch in batches:
            criterion(model, batch)

    ways = {path: lambda run=run: evaluate(*run[:3]) for path, run in zip(args.checkpoints, runs)}
    times, first = in_turn(ways, args.rounds), args.checkpoints[0]
    for path, (*_, batches, values, flops) in zip(args.checkpoints, runs):
        size = sum(int(batch["nsentences"]) for batch in batches)
        faster = ratios(times[first], times[path])
        print(
            f"{path}: {' '.join(f'{name} {values[name]}' for name in args.log if name in values)}, "
            f"{flops / 1e6:.2f} MFLOPs a sentence ({runs[0][-1] / flops:.2f} times fewer), "
            f"{size / median(times[path]):.1f} sentences/s, {statistics.median(faster):.2f} times as fast "
            f"({faster[0]:.2f} to {faster[-1]:.2f})"
        )
    flops = {path: size * run[-1] for path, run in zip(args.checkpoints, runs)}
    record.add(f"{size} sentences", times, first, flops=flops, sentences=size)
    record.write()


if __name__ == "__main__":
    run(main)

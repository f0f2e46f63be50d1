#!/usr/bin/env python3
"""Updates per second of stock fairseq's Transformer and loss and of ours at equal depth, in fp32 and in bfloat16.

An update is forward, loss, backward and Adam. The mean loss over the same updates is printed beside.
"""

import statistics

import torch
from common import build_pair, compare, describe, parser
from fairseq.logging import metrics
from fairseq.trainer import Trainer
from record import CLOCKS, spent

from fairseq_adaptive.command import run
from fairseq_adaptive.ranges import COUNT

STOCK = "--optimizer adam --lr 5e-4 --criterion label_smoothed_cross_entropy --label-smoothing 0.1 --dropout 0.1"
OURS = ("--criterion", "fused_label_smoothed_cross_entropy")


def build_trainers(args, *ours):
    trainers = []
    for cfg, task, model in build_pair(args, *STOCK.split(), "--max-tokens", args.max_tokens, ours=(*OURS, *ours)):
        task.load_dataset("train")
        trainers.append(Trainer(cfg, task, model, task.build_criterion(cfg.criterion)))
        trainers[-1].optimizer  # built at first use
    batches = trainers[0].get_train_iterator(1).next_epoch_itr(shuffle=True)
    return trainers, [next(batches) for _ in range(args.updates)]


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--max-tokens", default="2048")
    arguments.add_argument("--updates", type=COUNT, default=10, help="updates a round, on the same batches for both")
    arguments.add_argument("--processor-time", action="store_true", help="leave out the time that other processes take")
    arguments.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=("fp32", "bf16"), help="of ours")
    args = arguments.parse_args()
    record, by = describe(args), CLOCKS[args.processor_time]
    for precision in args.precision:
        trainers, batches = build_trainers(args, *(["--bf16"] if precision == "bf16" else []))
        losses = [[], []]

        def measure(which):
            torch.manual_seed(len(losses[which]))
            with metrics.aggregate(new_root=True) as log:
                seconds = spent(lambda: [trainers[which].train_step([batch]) for batch in batches])
            losses[which].append(log["loss"].avg)
            return seconds.per(len(batches))

        compare(record, f"stock in fp32, ours in {precision}", measure, args.rounds, by)
        first, last = ([round(float(each[index]), 3) for each in losses] for index in (0, -1))
        apart = statistics.median(abs(ours / stock - 1) for stock, ours in zip(*losses, strict=True))
        print(f"loss, stock and ours: first round {first}, last {last}, median difference {100 * apart:.2f}%")
    record.write()


if __name__ == "__main__":
    run(main)

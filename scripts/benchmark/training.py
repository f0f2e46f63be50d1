#!/usr/bin/env python3
"""Updates per second of stock fairseq's Transformer and of ours at equal depth: forward, loss, backward, Adam."""

import time

from common import build_pair, compare, describe, parser
from fairseq.trainer import Trainer


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--max-tokens", default="2048")
    arguments.add_argument("--updates", type=int, default=10, help="updates a round, on the same batches for both")
    args = arguments.parse_args()
    describe(args)
    flags = "--optimizer adam --lr 1e-4 --criterion label_smoothed_cross_entropy --label-smoothing 0.1 --dropout 0.1"
    trainers, batches = [], []
    for cfg, task, model in build_pair(args, *flags.split(), "--max-tokens", args.max_tokens):
        task.load_dataset("train")
        trainers.append(Trainer(cfg, task, model, task.build_criterion(cfg.criterion)))
        trainers[-1].optimizer  # built at first use
        batches = trainers[-1].get_train_iterator(1).next_epoch_itr(shuffle=True)
        batches = [next(batches) for _ in range(args.updates)]

    def measure(which):
        start = time.perf_counter()
        for batch in batches:
            trainers[which].train_step([batch])
        return len(batches) / (time.perf_counter() - start)

    compare("updates/s", measure, args.rounds)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Sentences per second of beam search with stock fairseq's Transformer and with ours, same weights, same hypotheses."""

import time

import torch
from common import build_pair, compare, describe, parser


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--beam", type=int, default=5)
    arguments.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 64])
    arguments.add_argument("--sentences", type=int, default=128, help="of the test set, a round (a quarter at batch 1)")
    args = arguments.parse_args()
    describe(args)
    runs = []
    for cfg, task, model in build_pair(args):
        task.load_dataset("test")
        cfg.generation.beam, cfg.generation.max_len_a, cfg.generation.max_len_b = args.beam, 1.0, 2
        model.eval().prepare_for_inference_(cfg)
        runs.append((task, model, task.build_generator([model], cfg.generation)))

    def decode(which, batch_size, count):
        task, model, generator = runs[which]
        data, hypotheses = task.dataset("test"), []
        for first in range(0, count, batch_size):
            sample = data.collater([data[i] for i in range(first, min(first + batch_size, count))])
            hypotheses += generator.generate([model], sample)
        return hypotheses

    for batch_size in args.batch_sizes:
        count = min(args.sentences // 4 if batch_size == 1 else args.sentences, len(runs[0][0].dataset("test")))
        for stock, ours in zip(*(decode(which, batch_size, count) for which in (0, 1))):
            assert torch.equal(stock[0]["tokens"], ours[0]["tokens"])
            torch.testing.assert_close(stock[0]["score"], ours[0]["score"], rtol=0, atol=1e-4)

        def measure(which):
            start = time.perf_counter()
            decode(which, batch_size, count)
            return count / (time.perf_counter() - start)

        compare(f"sentences/s, beam {args.beam}, batch {batch_size}", measure, args.rounds)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Greedy search with and without --self-speculative, side by side, with steps of torch's operations and with native ones.

All search with one model (shared_transformer) over the test set, in turn, in one process. Time is that of the processor. What
hypotheses with drafts differ from those without, and how many drafts were said, stands beside. The adaptive number of drafts
(at most --draft) is measured beside one that is always --draft.
"""

import argparse
import os
import statistics
from unittest import mock

import torch
from common import describe
from fairseq import checkpoint_utils, options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from record import CLOCKS, add_json, in_turn, median, ratios

from fairseq_adaptive.command import run
from fairseq_adaptive.modules.layers.prepacked_linear import constant_weights
from fairseq_adaptive.ops.decoder_step import OP
from fairseq_adaptive.ops.registry import VARIABLE
from fairseq_adaptive.ranges import BATCH, COUNT, LAYERS, ROUNDS, Parser, Range


def searcher(args, model, task, kernels, exit_depth=None, adapts=True):
    """``decode(samples)`` as ``fairseq-generate`` does it, and its generator."""
    command = [args.data, "--path", args.checkpoint, "--beam", "1", "--cpu"]
    command += ["--max-len-a", str(args.max_len_a), "--max-len-b", str(args.max_len_b)]
    if exit_depth is not None:
        command += ["--self-speculative", str(exit_depth), "--draft", str(args.draft)]
    cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(options.get_generation_parser(), command))
    generator = task.build_generator([model], cfg.generation)
    if exit_depth is not None:
        generator.adapts = adapts

    @constant_weights()  # as in fairseq-generate
    def decode(samples):
        with mock.patch.dict(os.environ, {VARIABLE: kernels}):
            return [found for sample in samples for found in task.inference_step(generator, [model], sample)]

    return decode, generator


def differing(one, other):
    """How many hypotheses have other words."""
    return sum(not torch.equal(a[0]["tokens"], b[0]["tokens"]) for a, b in zip(one, other))


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("data", help="folder of fairseq-preprocess")
    parser.add_argument("checkpoint", help="of a shared_transformer, such as one of --criterion early_exit_loss")
    parser.add_argument("--exit", type=LAYERS, nargs="+", default=[2, 3], help="depths that draft")
    parser.add_argument("--kernels", choices=("torch", "native"), nargs="+", default=["torch", "native"])
    parser.add_argument("--draft", type=Range(int, 1, 64), default=4)
    parser.add_argument("--int8", action="store_true", help="all of them in int8")
    parser.add_argument("--max-len-a", type=Range(float, 0, 100), default=1.2, help="as of fairseq-generate")
    parser.add_argument("--max-len-b", type=Range(int, 1, 1000), default=10)
    parser.add_argument("--batch-sizes", type=BATCH, nargs="+", default=[1, 64])
    parser.add_argument("--sentences", type=COUNT, default=1000, help="of the test set, a round (an eighth at batch 1)")
    parser.add_argument("--rounds", type=ROUNDS, default=5, help="how often all are measured in turn")
    add_json(parser)
    args = parser.parse_args()
    record, by = describe(args), CLOCKS[1]
    (model,), _, task = checkpoint_utils.load_model_ensemble_and_task(
        [args.checkpoint], arg_overrides={"data": args.data, **({"int8": True} if args.int8 else {})}
    )
    model.prepare_for_inference_(argparse.Namespace(generation=argparse.Namespace(print_alignment=None)))
    obstacle = OP.obstacle("native", "cpu", torch.float32)
    backends = [each for each in args.kernels if each == "torch" or obstacle is None]
    task.load_dataset("test")
    data = task.dataset("test")
    for batch_size in args.batch_sizes:
        runs = {}
        for kernels in backends:
            runs[kernels, "plain"] = searcher(args, model, task, kernels)
            for depth in args.exit:
                runs[kernels, f"E={depth}"] = searcher(args, model, task, kernels, depth)
                runs[kernels, f"E={depth}, always {args.draft}"] = searcher(args, model, task, kernels, depth, False)
        count = min(max(args.sentences // 8, 1) if batch_size == 1 else args.sentences, len(data))
        order = data.ordered_indices()[:: len(data) // count][:count].tolist()
        samples = [data.collater([data[i] for i in order[k : k + batch_size]]) for k in range(0, count, batch_size)]
        found = {name: decode(samples) for name, (decode, _) in runs.items()}
        ways = {name: lambda decode=decode: decode(samples) for name, (decode, _) in runs.items()}  # noqa: B023  at once
        times = in_turn(ways, args.rounds)
        named = {", ".join(name): measured for name, measured in times.items()}
        record.add(f"{count} sentences, batch {batch_size}", named, f"{backends[0]}, plain", sentences=count)
        for (kernels, kind), (_, generator) in runs.items():
            name = kernels, kind
            told = f"batch {batch_size}, {kernels}, {kind}: "
            told += f"{count / median(times[name], by):.1f} sentences/s"
            if kind != "plain":
                for other in backends:
                    faster = ratios(times[other, "plain"], times[name], by)
                    told += f"; {statistics.median(faster):.2f} ({faster[0]:.2f} to {faster[-1]:.2f}) of plain {other}"
                tally = generator.tally
                told += (
                    f"; {100 * tally.acceptance:.1f}% of drafts said, {tally.words / tally.rounds:.2f} words a round"
                )
                told += f"; {differing(found[name], found[kernels, 'plain'])} of {count} hypotheses differ"
            print(told, flush=True)
    record.write()


if __name__ == "__main__":
    run(main)

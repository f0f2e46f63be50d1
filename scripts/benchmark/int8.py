#!/usr/bin/env python3
"""What int8 saves in inference, and what it changes: one model in float32 and in int8, run in turn.

Without --checkpoint a Transkimmer with random weights, as in skimming.py: which tokens are skimmed is drawn, the same for
both. Both are as evaluation has them, their weights laid out once. With --checkpoint a model of --task sentence_prediction
on the texts of --texts, a label, a space and a text in a line.
"""

import argparse
import statistics

import common
import torch
from record import CLOCKS, add_json, in_turn, median, ratios
from skimming import build, plan

from fairseq_adaptive import command
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.files import read_lines
from fairseq_adaptive.hub import TranskimmerClassifier
from fairseq_adaptive.modules.layers.prepacked_linear import PrepackedWeights, constant_weights
from fairseq_adaptive.ops.int8_linear import OP, int8_weights, kind
from fairseq_adaptive.ops.int8_linear.eager import way
from fairseq_adaptive.ranges import BATCH, POSITIONS, ROUNDS, SHARE, Parser

KINDS, PROCESSOR = ("fp32", "int8"), CLOCKS[1]


def both_in_turn(ways, rounds):
    """What the two return first, and their seconds when they are called in turn."""
    results = [each() for each in ways]
    return results, in_turn(dict(zip(KINDS, ways)), rounds)


def ratio(times):
    """The median of the ratios of the first to the second, round by round, and their range."""
    found = ratios(*times.values(), PROCESSOR)
    return f"{statistics.median(found):5.2f} ({found[0]:.2f} to {found[-1]:.2f})"


def milliseconds(times):
    return " ".join(f"{1e3 * median(each, PROCESSOR):9.2f}" for each in times.values())


def products(rounds, record):
    print("map, rows          fp32 ms   int8 ms  speed-up (rounds)        difference")
    for inputs, outputs in ((384, 384), (384, 1536), (1536, 384)):
        weight, bias = torch.randn(outputs, inputs) * inputs**-0.5, torch.zeros(outputs)
        plain = PrepackedWeights(weight, bias)
        for rows in (16, 128, 1024):
            x = torch.randn(rows, inputs)
            small = int8_weights(weight, bias, kind(x, weight))
            plain(x), plain(x)
            (expected, found), times = both_in_turn((lambda: plain(x), lambda: small(x)), 5 * rounds)
            difference, flops = float((found - expected).norm() / expected.norm()), 2 * x.numel() * outputs
            record.add(f"{inputs} x {outputs}, {rows} rows", times, "fp32", flops=flops, difference=difference)
            print(
                f"{inputs:4} x {outputs:4}, {rows:4} {milliseconds(times)}  {ratio(times):24} {difference:.4f}",
                flush=True,
            )


def random_model(args, record):
    plain, model = build(args)
    small, other = build(args)
    other.int8()
    products(args.rounds, record)
    print("batch length kept   fp32 ms   int8 ms  speed-up (rounds)        difference of states")
    for length in args.lengths:
        for batch in args.batch_sizes:
            tokens = torch.randint(4, 1000, (batch, length))
            for kept in args.kept:
                for each in (model, other):
                    plan(each.encoder.sentence_encoder.layers.router, kept, batch, length)
                (one, two), times = both_in_turn((lambda: plain(tokens)[0], lambda: small(tokens)[0]), args.rounds)
                moved = float((one - two).norm() / one.norm())
                record.add(f"{batch} x {length}, {kept:.2f} kept", times, "fp32", difference=moved)
                print(
                    f"{batch:5} {length:6} {kept:4.2f} {milliseconds(times)}  {ratio(times):24} {moved:.4f}", flush=True
                )


def difference(one, other):
    """How predictions of the same texts differ, in words."""
    labels = sum(each.label != its.label for each, its in zip(one, other))
    moved = [abs(each.probabilities[each.label] - its.probabilities[each.label]) for each, its in zip(one, other)]
    tokens = [mine != its for each, other_one in zip(one, other) for mine, its in zip(each.updates, other_one.updates)]
    return (
        f"{labels} of {len(moved)} labels differ, probabilities by {statistics.mean(moved):.1e} on average and "
        f"{max(moved):.1e} at most, the layers of {100 * statistics.mean(tokens):.2f}% of the tokens"
    )


def trained_model(args, record):
    rows = [line.split(None, 1) for line in read_lines(args.texts) if line.strip()]
    labels, texts = zip(*rows)
    models = [
        TranskimmerClassifier.from_pretrained(args.checkpoint, args.data, args.tokenizer, device="cpu", int8=int8)
        for int8 in (False, True)
    ]
    models[0].model.make_generation_fast_()
    by_batch = []
    for batch in args.batch_sizes:
        said, times = both_in_turn([lambda each=each: each.predict(texts, batch) for each in models], args.rounds)
        by_batch.append(said)
        for name, found in zip(KINDS, said):
            right = sum(each.label == label for each, label in zip(found, labels))
            done = [updates for each in found for updates in each.updates]
            print(
                f"batch {batch}, {name}: {100 * right / len(labels):.2f}% right, {statistics.mean(done):.3f} layers a token"
            )
        print(f"batch {batch}, int8 against fp32: {difference(*said)}")
        record.add(f"{len(texts)} texts, batch {batch}", times, "fp32", texts=len(texts))
        print(f"batch {batch}: ms {milliseconds(times)}, speed-up {ratio(times)}", flush=True)
    for name, one, other in zip(KINDS, by_batch[0], by_batch[-1]):
        print(f"{name}, batch {args.batch_sizes[-1]} against {args.batch_sizes[0]}: {difference(one, other)}")


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--arch", default="transkimmer_minilm_l6", help="of the model with random weights")
    parser.add_argument("--batch-sizes", type=BATCH, nargs="+", default=[1, 8, 32])
    parser.add_argument("--lengths", type=POSITIONS, nargs="+", default=[128])
    parser.add_argument("--kept", type=SHARE, nargs="+", default=[1.0, 0.2], help="mean shares of tokens in layers")
    parser.add_argument("--rounds", type=ROUNDS, default=7, help="how often the two are measured in turn")
    parser.add_argument("--checkpoint", metavar="FILE")
    parser.add_argument("--texts", metavar="FILE")
    parser.add_argument("--data", metavar="FOLDER", help="the binarised training data (default: as in training)")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="with the vocabulary (default: that of the data)")
    add_json(parser)
    args = parser.parse_args()
    if (args.checkpoint is None) != (args.texts is None):
        raise UsageError("--checkpoint and --texts go together: name both, or neither")
    args.lengths.sort()
    torch.manual_seed(1)
    record = common.describe(args)
    print(
        "seconds of the processor; int8 by",
        way().name if OP.choose("cpu", torch.float32)[0] == "torch" else "native products",
    )
    with torch.no_grad(), constant_weights():
        (random_model if args.checkpoint is None else trained_model)(args, record)
    record.write()


if __name__ == "__main__":
    command.run(main)

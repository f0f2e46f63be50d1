#!/usr/bin/env python3
"""Wall-clock of stock fairseq's RoBERTa and of Transkimmer, packed, in inference, beside the FLOPs that skimming saves.

Which tokens are skimmed is drawn, so that a layer keeps the same share of what comes to it in every layer and the mean
share over layers is the one asked for. The predictors run all the same. Texts have no padding: with it, the stock model
computes padding and ours does not.
"""

import argparse
import statistics
import time

import common  # noqa: F401  quiet
import torch
from fairseq.data import Dictionary
from fairseq.models import ARCH_CONFIG_REGISTRY
from fairseq.models.roberta import RobertaModel

from fairseq_adaptive.models.transkimmer import TranskimmerModel
from fairseq_adaptive.modules import recording
from fairseq_adaptive.report.skimming import skim_macs

STACK = "encoder.sentence_encoder.layers"


def build(args, stock):
    flags = argparse.Namespace(max_positions=args.lengths[-1], **({"no_skimming": True} if stock == "dense" else {}))
    ARCH_CONFIG_REGISTRY[args.arch](flags)
    words = Dictionary()
    for number in range(1000):
        words.add_symbol(f"word{number}")
    torch.manual_seed(1)
    model = (RobertaModel if stock == "stock" else TranskimmerModel).build_model(
        flags, argparse.Namespace(source_dictionary=words))
    return model.eval()


def plan(router, kept, batch, length):
    """Make the router keep, layer by layer, what was drawn; it still computes its scores."""
    low, high = 0.0, 1.0
    for _ in range(50):
        share = (low + high) / 2
        mean = sum(share ** (depth + 1) for depth in range(len(router))) / len(router)
        low, high = (share, high) if mean < kept else (low, share)
    stays = torch.rand(batch, length, generator=torch.Generator().manual_seed(1)).argsort(1).argsort(1) / length
    scored, state = type(router).decide, {}

    def decide(depth, x, protected=None):
        scored(router, depth, x)
        left = state["left"] if depth else stays.flatten()
        keep = (left < share ** (depth + 1)) | protected
        state["left"] = left[keep]
        return keep.float(), keep.float()

    router.decide = decide


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--arch", default="transkimmer_minilm_l6")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--kept", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.5, 0.7, 1.0],
                        help="mean shares of tokens that the layers keep")
    parser.add_argument("--against", choices=("stock", "dense"), default="stock",
                        help="stock fairseq's RoBERTa of the same shape, or transkimmer with --no-skimming")
    parser.add_argument("--rounds", type=int, default=7, help="how often the two are measured in turn")
    args = parser.parse_args()
    args.lengths.sort()
    common.describe(args)
    stock, ours = build(args, args.against), build(args, None)
    layers = ours.encoder.sentence_encoder.layers
    print("batch length  kept   stock ms   ours ms   speed-up   FLOPs ratio   of it")
    for length in args.lengths:
        for batch in args.batch_sizes:
            tokens = torch.randint(4, 1000, (batch, length))
            for kept in args.kept:
                plan(layers.router, kept, batch, length)
                with torch.no_grad(), recording(ours) as traces:
                    ours(tokens, features_only=True)
                trace = traces[STACK][0]
                spent, dense = skim_macs(trace, layers[0].embed_dim, layers[0].fc1.out_features,
                                         [step.alive for step in trace.steps])
                times = [[], []]
                for _ in range(args.rounds + 1):
                    for model, measured in zip((stock, ours), times):
                        start = time.perf_counter()
                        with torch.no_grad():
                            model(tokens, features_only=True)
                        measured.append(time.perf_counter() - start)
                theirs, mine = (statistics.median(measured[1:]) for measured in times)
                speedup = statistics.median(a / b for a, b in zip(times[0][1:], times[1][1:]))
                flops, share = float(dense / spent), float(trace.updates.float().mean()) / len(layers)
                print(f"{batch:5} {length:6} {share:5.2f} {theirs * 1e3:10.1f} {mine * 1e3:9.1f} {speedup:10.2f} "
                      f"{flops:13.2f} {speedup / flops:7.2f}", flush=True)


if __name__ == "__main__":
    main()

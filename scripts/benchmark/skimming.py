#!/usr/bin/env python3
"""Wall-clock of a dense encoder and of Transkimmer, packed, in inference, beside the FLOPs that skimming saves.

Which tokens are skimmed is drawn, so that a layer keeps the same share of what comes to it in every layer and the mean
share over layers is the one asked for. The predictors run all the same. Texts have no padding: with it, the peers
compute padding and ours does not. Both models are as ``make_generation_fast_`` leaves them, and
no weights change.
"""

import argparse
import functools
import statistics
import time

import common  # noqa: F401  quiet
import torch
from fairseq.data import Dictionary
from fairseq.models import ARCH_CONFIG_REGISTRY
from fairseq.models.roberta import RobertaModel

from fairseq_adaptive import command
from fairseq_adaptive.models.transkimmer import TranskimmerModel
from fairseq_adaptive.modules import recording
from fairseq_adaptive.modules.layers.prepacked_linear import constant_weights
from fairseq_adaptive.modules.policies import Choice
from fairseq_adaptive.modules.stack.compute import stack_macs
from fairseq_adaptive.ranges import BATCH, POSITIONS, ROUNDS, SHARE, Parser

STACK = "encoder.sentence_encoder.layers"


PEERS = {
    "stock": "stock fairseq's RoBERTa of the same shape",
    "huggingface": "transformers' BERT of the same shape",
    "dense": "transkimmer with --no-skimming",
}


def build(args, peer=None):
    """A function from tokens, B x T, to states; and the model."""
    flags = argparse.Namespace(max_positions=args.lengths[-1], **({"no_skimming": True} if peer == "dense" else {}))
    ARCH_CONFIG_REGISTRY[args.arch](flags)
    if peer == "huggingface":
        from transformers import BertConfig, BertModel

        model = BertModel(
            BertConfig(
                vocab_size=1005,
                hidden_size=flags.encoder_embed_dim,
                num_hidden_layers=flags.encoder_layers,
                num_attention_heads=flags.encoder_attention_heads,
                intermediate_size=flags.encoder_ffn_embed_dim,
            ),
            add_pooling_layer=False,
        ).eval()
        return model, model
    words = Dictionary()
    for number in range(1000):
        words.add_symbol(f"word{number}")
    torch.manual_seed(1)
    model = (
        (RobertaModel if peer == "stock" else TranskimmerModel)
        .build_model(flags, argparse.Namespace(source_dictionary=words))
        .eval()
    )
    model.make_generation_fast_()
    return functools.partial(model, features_only=True), model


def plan(router, kept, batch, length):
    """Make the router keep, layer by layer, what was drawn; it still computes its scores."""
    low, high = 0.0, 1.0
    for _ in range(50):
        share = (low + high) / 2
        mean = sum(share ** (depth + 1) for depth in range(len(router))) / len(router)
        low, high = (share, high) if mean < kept else (low, share)
    stays = torch.rand(batch, length, generator=torch.Generator().manual_seed(1)).argsort(1).argsort(1) / length
    scored, state = type(router).choose, {}

    def choose(depth, x, carry, asked, sentence, protected, causal):
        scored(router, depth, x, carry, asked, sentence, protected, causal)
        left = state["left"] if depth else stays.flatten()
        keep = (left < share ** (depth + 1)) | protected
        state["left"] = left[keep]
        return Choice(keep.float(), keep.float())

    router.choose = choose


@constant_weights()  # as in fairseq-validate: our matrices are laid out for the processor
def main():
    parser = Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--arch", default="transkimmer_minilm_l6")
    parser.add_argument("--batch-sizes", type=BATCH, nargs="+", default=[1, 8, 32])
    parser.add_argument("--lengths", type=POSITIONS, nargs="+", default=[128, 512])
    parser.add_argument(
        "--kept",
        type=SHARE,
        nargs="+",
        default=[0.1, 0.2, 0.3, 0.5, 0.7, 1.0],
        help="mean shares of tokens that the layers keep",
    )
    parser.add_argument(
        "--against", choices=PEERS, default="stock", help="; ".join(f"{name}: {what}" for name, what in PEERS.items())
    )
    parser.add_argument("--rounds", type=ROUNDS, default=7, help="how often the two are measured in turn")
    parser.add_argument(
        "--cpu-time",
        dest="clock",
        action="store_const",
        const=time.process_time,
        default=time.perf_counter,
        help="seconds of the processor, where others use it too",
    )
    args = parser.parse_args()
    args.lengths.sort()
    common.describe(args)
    (peer, _), (ours, model) = build(args, args.against), build(args)
    layers = model.encoder.sentence_encoder.layers
    print(f"batch length  kept {args.against[:7]:>7} ms   ours ms   speed-up   FLOPs ratio   of it")
    for length in args.lengths:
        for batch in args.batch_sizes:
            tokens = torch.randint(4, 1000, (batch, length))
            for kept in args.kept:
                plan(layers.router, kept, batch, length)
                with torch.no_grad(), recording(model) as traces:
                    ours(tokens)
                trace = traces[STACK][0]
                spent, dense = stack_macs(layers, trace)
                times = [[], []]
                for _ in range(args.rounds + 1):
                    for run, measured in zip((peer, ours), times):
                        start = args.clock()
                        with torch.no_grad():
                            run(tokens)
                        measured.append(args.clock() - start)
                theirs, mine = (statistics.median(measured[1:]) for measured in times)
                speedup = statistics.median(a / b for a, b in zip(times[0][1:], times[1][1:]))
                flops, share = float(dense / spent), float(trace.updates.float().mean()) / len(layers)
                print(
                    f"{batch:5} {length:6} {share:5.2f} {theirs * 1e3:10.1f} {mine * 1e3:9.1f} {speedup:10.2f} "
                    f"{flops:13.2f} {speedup / flops:7.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    command.run(main)

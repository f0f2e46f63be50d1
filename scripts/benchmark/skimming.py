#!/usr/bin/env python3
"""Wall-clock of a dense encoder and of Transkimmer, packed, in inference, beside the FLOPs that skimming saves.

Which tokens are skimmed is drawn, so that a layer keeps the same share of what comes to it in every layer and the mean
share over layers is the one asked for. The predictors run all the same. Texts have no padding: with it, the peers
compute padding and ours does not. Both models are as ``make_generation_fast_`` leaves them, and
no weights change.
"""

import argparse
import functools
import logging
import os
import statistics
import tempfile

import common  # noqa: F401  quiet
import torch
from fairseq.data import Dictionary
from fairseq.models import ARCH_CONFIG_REGISTRY
from fairseq.models.roberta import RobertaModel
from record import CLOCKS, add_json, in_turn, median, ratios

from fairseq_adaptive import command
from fairseq_adaptive.hub.exporting import Exportable, write_graph
from fairseq_adaptive.models.transkimmer import TranskimmerModel
from fairseq_adaptive.modules import recording
from fairseq_adaptive.modules.layers.prepacked_linear import constant_weights
from fairseq_adaptive.modules.plain_encoder import EncoderDescription, PlainEncoder
from fairseq_adaptive.modules.policies import Choice
from fairseq_adaptive.modules.stack.compute import stack_macs
from fairseq_adaptive.ranges import BATCH, POSITIONS, ROUNDS, SHARE, Parser

STACK = "encoder.sentence_encoder.layers"


PEERS = {
    "stock": "stock fairseq's RoBERTa of the same shape",
    "huggingface": "transformers' BERT of the same shape",
    "dense": "transkimmer with --no-skimming",
    "onnxruntime": "ONNX Runtime with an encoder of the same shape, as fairseq-adaptive export --to onnx writes it",
    "onnxruntime-int8": "the same in int8, quantised as it runs",
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
    if peer is not None and peer.startswith("onnxruntime"):
        return build_onnx(flags, peer.endswith("int8")), None
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
    if getattr(args, "int8", False) and peer != "stock":
        model.int8()
    return functools.partial(model, features_only=True), model


def build_onnx(flags, int8):
    """A function from tokens to states, by ONNX Runtime on as many threads as torch has."""
    sizes = flags.encoder_embed_dim, flags.encoder_ffn_embed_dim, flags.encoder_attention_heads
    own = {"max_positions": flags.max_positions, "embedding_norm": True, "activation_fn": "gelu"}
    about = EncoderDescription(1005, *sizes, tuple(range(flags.encoder_layers)), **own)
    with tempfile.TemporaryDirectory() as folder:
        path, small = os.path.join(folder, "model.onnx"), os.path.join(folder, "int8.onnx")
        write_graph(Exportable(PlainEncoder(about)), path)
        import onnxruntime
        from onnxruntime.quantization import quantize_dynamic

        if int8:
            logging.disable(logging.WARNING)  # it names what stays in float32
            quantize_dynamic(path, small)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(small if int8 else path, options, providers=["CPUExecutionProvider"])
    return lambda tokens: session.run(None, {"tokens": tokens.numpy()})


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
    parser.add_argument("--int8", action="store_true", help="ours and dense run in int8")
    parser.add_argument("--rounds", type=ROUNDS, default=7, help="how often the two are measured in turn")
    parser.add_argument(
        "--cpu-time",
        dest="clock",
        action="store_const",
        const=CLOCKS[1],
        default=CLOCKS[0],
        help="seconds of the processor, where others use it too",
    )
    add_json(parser)
    args = parser.parse_args()
    args.lengths.sort()
    record = common.describe(args)
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
                with torch.no_grad():
                    ways = {args.against: lambda: peer(tokens), "ours": lambda: ours(tokens)}  # noqa: B023  at once
                    times = in_turn(ways, args.rounds, warm=1)
                theirs, mine = (median(measured, args.clock) for measured in times.values())
                speedup = statistics.median(ratios(*times.values(), args.clock))
                flops, share = float(dense / spent), float(trace.updates.float().mean()) / len(layers)
                macs = {args.against: 2 * float(dense), "ours": 2 * float(spent)}
                record.add(f"{batch} x {length}, {share:.2f} kept", times, args.against, flops=macs, kept=share)
                print(
                    f"{batch:5} {length:6} {share:5.2f} {theirs * 1e3:10.1f} {mine * 1e3:9.1f} {speedup:10.2f} "
                    f"{flops:13.2f} {speedup / flops:7.2f}",
                    flush=True,
                )
    record.write()


if __name__ == "__main__":
    command.run(main)

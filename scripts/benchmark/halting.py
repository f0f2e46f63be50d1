#!/usr/bin/env python3
"""What halting saves: packed against dense runs of one ALBERT-ACT, and against the public code, same random weights.

The saving in wall-clock is that of dense over packed; the arithmetic saving counts multiplications of matrices. On a CPU the
packed run stands beside itself with weights laid out once, as in fairseq-validate, and beside that in int8. Run with --peer in
an environment that has transformers 4.23, which the public code needs.
"""

import argparse
import contextvars
import copy
import importlib.util
import statistics
import sys
from pathlib import Path

import torch
from common import describe
from record import add_json, in_turn, median, ratios
from torch.utils.flop_counter import FlopCounterMode

from fairseq_adaptive.command import device, run
from fairseq_adaptive.hub import AlbertActModel
from fairseq_adaptive.interop.albert_act import FIXED, NAMES, numbered_dictionary, read_config
from fairseq_adaptive.models.albert_act import AlbertActModel as FairseqModel
from fairseq_adaptive.modules.layers.prepacked_linear import constant_weights
from fairseq_adaptive.ranges import BATCH, BIAS, COUNT, LAYERS, ROUNDS, SEED, Parser

LAID_OUT, INT8 = "packed, laid out", "packed, int8"
SHAPE = {"embedding_size": 128, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}


def build(args):
    """Our model, and the published names of its weights."""
    config = {
        **FIXED,
        **SHAPE,
        "vocab_size": 1000,
        "num_hidden_layers": args.layers,
        "hidden_act": "gelu",
        "max_position_embeddings": args.tokens,
        "act_epsilon": 0.01,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "classifier_dropout_prob": 0.0,
    }
    torch.manual_seed(args.seed)
    task = argparse.Namespace(source_dictionary=numbered_dictionary(config["vocab_size"]))
    model = FairseqModel.build_model(argparse.Namespace(**read_config(config)), task)
    unit = model.encoder.layers.halting.unit
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=module.in_features**-0.5)
    torch.nn.init.normal_(unit.weight, std=1.2 * unit.in_features**-0.5)
    torch.nn.init.constant_(unit.bias, args.halting_bias)
    return config, AlbertActModel(config, model).eval().to(args.device)


def build_peer(folder, config, ours):
    """The public model with our weights, from a checkout of its repository."""
    path = Path(folder) / "act" / "hf" / "modeling_albert_act.py"
    spec = importlib.util.spec_from_file_location("public_albert_act", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    from transformers import AlbertConfig

    peer = module.AlbertActModel(AlbertConfig(**config)).eval()
    back, state = ours._fairseq_ids, ours.model.state_dict()
    weights = {theirs: state[name] for name, theirs in NAMES.items() if "_head." not in name}
    weights["embeddings.word_embeddings.weight"] = weights["embeddings.word_embeddings.weight"][back]
    missing = peer.load_state_dict(weights, strict=False).missing_keys
    assert missing == ["embeddings.position_ids"], missing
    return peer


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--peer", metavar="FOLDER", help="checkout of AntoineSimoulin/adaptive-depth-transformers")
    parser.add_argument("--layers", type=LAYERS, default=24)
    parser.add_argument("--tokens", type=COUNT, default=128, help="of every sequence")
    parser.add_argument("--batch-sizes", type=BATCH, nargs="+", default=[8, 32])
    parser.add_argument("--halting-bias", type=BIAS, default=-2.2, help="of the halting unit: the lower, the deeper")
    parser.add_argument("--rounds", type=ROUNDS, default=5, help="how often all are measured in turn")
    parser.add_argument("--device", type=device, default="cpu")
    parser.add_argument("--seed", type=SEED, default=1)
    add_json(parser)
    args = parser.parse_args()
    record = describe(args)
    config, model = build(args)
    stack = model.model.encoder.layers
    peer = build_peer(args.peer, config, model) if args.peer else None
    kinds = ["dense", "packed"] + ["public"] * bool(peer)
    if torch.device(args.device).type == "cpu":
        kinds += [LAID_OUT, INT8]
        small = copy.deepcopy(model)
        small.model.int8()
        constant, opened = contextvars.copy_context(), constant_weights()  # in which no weights change
        constant.run(opened.__enter__)

    def forward(kind, ids):
        if kind == "public":
            return peer(ids)
        if kind == INT8:
            return constant.run(small, ids)
        stack.packed = kind != "dense"
        return constant.run(model, ids) if kind == LAID_OUT else model(ids)

    def forward_and_wait(kind, ids):
        forward(kind, ids)
        if ids.is_cuda:
            torch.cuda.synchronize()

    for batch in args.batch_sizes:
        ids = torch.randint(4, config["vocab_size"], (batch, args.tokens), device=args.device)
        outputs, flops = {}, {}
        for kind in kinds:  # checks, and warms up
            with FlopCounterMode(display=False) as counter:
                outputs[kind] = forward(kind, ids)
            flops[kind] = counter.get_total_flops()
        updates = outputs["dense"].updates
        for kind in kinds[1:]:
            expected = outputs["dense"].last_hidden_state
            difference = (outputs[kind].last_hidden_state - expected).norm() / expected.norm()
            theirs = outputs[kind].updates
            theirs = theirs[0, 0] if kind == "public" else theirs  # the public code returns copies, 1 x 1 x B x T
            same = theirs.long().view_as(updates).eq(updates).double().mean()
            print(
                f"batch {batch}: {kind} differs from dense by {float(difference):.1e} of the states' size, updates equal "
                f"for {100 * float(same):.1f}% of the tokens"
            )
        ways = {kind: lambda kind=kind, ids=ids: forward_and_wait(kind, ids) for kind in kinds}
        times = in_turn(ways, args.rounds, warm=2)  # weights are laid out at the second call
        seconds = {kind: median(measured) for kind, measured in times.items()}
        saving = statistics.median(ratios(times["dense"], times["packed"]))
        depth = float(updates.double().mean())
        record.add(f"{batch} x {args.tokens}", times, "dense", flops=flops, depth=depth)
        arithmetic = flops["dense"] / flops["packed"]
        print(
            f"batch {batch}: mean depth {depth:.2f} of {int(updates.max())}; "
            + ", ".join(f"{kind} {value:.2f} s" for kind, value in seconds.items())
            + f"; saving in time {saving:.2f}, in arithmetic {arithmetic:.2f}, ratio {saving / arithmetic:.2f}"
            + (f"; public / packed {seconds['public'] / seconds['packed']:.2f}" if peer else "")
            + (f"; {LAID_OUT} / {INT8} {seconds[LAID_OUT] / seconds[INT8]:.2f}" if INT8 in kinds else ""),
            flush=True,
        )
    record.write()
    if INT8 in kinds:
        constant.run(opened.__exit__, None, None, None)


if __name__ == "__main__":
    run(torch.no_grad()(main))

#!/usr/bin/env python3
"""Sentences per second of beam search, side by side: stock fairseq's Transformer and search, ours, CTranslate2 and Marian.

All have the weights of one checkpoint of a model with shared layers. Ours is measured with steps of torch's operations and
with native ones (FAIRSEQ_ADAPTIVE_KERNELS=torch and native), and these in int8, too; stock fairseq and both in float32 must
find the same hypotheses with the same scores, and how many others int8 and --also find is printed. CTranslate2, in float32
and int8, is left out where it is not installed, and native steps where they cannot run, with the reason. Marian (pymarian,
marian.py) has post-LN models only, and finds hypotheses of its own: its seconds are taken for as many words as stock's. A
model in which tokens halt has no plain counterpart: stock is then fairseq's search with the model itself. The machine's own
speed stands beside: products of as many rows as a step has.
"""

import argparse
import ast
import os
import statistics
import tempfile
from unittest import mock

import marian
import numpy as np
import torch
from common import describe
from fairseq import checkpoint_utils, options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.sequence_generator import SequenceGenerator
from record import CLOCKS, add_json, in_turn, median, ratios

from fairseq_adaptive.command import run
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.interop import convert_to_ctranslate2, load_checkpoint, save_checkpoint, unroll_checkpoint
from fairseq_adaptive.modules.layers.prepacked_linear import constant_weights
from fairseq_adaptive.modules.policies import Halting
from fairseq_adaptive.ops.decoder_step import OP, native
from fairseq_adaptive.ops.registry import VARIABLE
from fairseq_adaptive.ranges import BATCH, COUNT, ROUNDS, UPDATES, Parser, Range

INT8, MARIAN = "ours, native, int8", "Marian float32"
EXACT = ("ours, torch", "ours, native")


def fairseq_search(args, path, generator_class=None, **overrides):
    """Return the model, its task, and ``decode(samples)`` as ``fairseq-generate`` does it."""
    command = [args.data, "--path", path, "--beam", str(args.beam), "--cpu"]
    command += ["--max-len-a", str(args.max_len_a), "--max-len-b", str(args.max_len_b)]
    cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(options.get_generation_parser(), command))
    overrides["data"] = args.data
    (model,), _, task = checkpoint_utils.load_model_ensemble_and_task([path], arg_overrides=overrides)
    model.prepare_for_inference_(cfg)
    generator = task.build_generator([model], cfg.generation, generator_class)

    @constant_weights()  # as in fairseq-generate
    def decode(samples):
        return [found for sample in samples for found in task.inference_step(generator, [model], sample)]

    return model, task, decode


def on(kernels, decode):
    """``decode`` with the implementation of some name."""

    def decode_on(samples):
        with mock.patch.dict(os.environ, {VARIABLE: kernels}):
            return decode(samples)

    return decode_on


def print_speeds(model, beam, batch_sizes):
    """GFLOP/s of the largest product of a layer and of the output layer, at the rows of a step."""
    layer, threads = model.decoder.layers[0], torch.get_num_threads()
    for batch_size in batch_sizes:
        for linear in filter(None, (layer.fc1, model.decoder.output_projection)):
            sizes = batch_size * beam, linear.in_features, linear.out_features
            own, others = native.speeds(sizes[1], sizes[2], sizes[0], threads)
            print("GFLOP/s, {} rows, {} to {}: torch {:.1f}, native {:.1f}".format(*sizes, others, own), flush=True)


def ctranslate2_search(args, folder, state, words, kind):
    try:
        import ctranslate2
    except ImportError:
        return None
    if not os.path.exists(folder):
        convert_to_ctranslate2(state, args.data, folder)
    translator = ctranslate2.Translator(folder, compute_type=kind, intra_threads=torch.get_num_threads())

    def decode(samples):
        for sample in samples:
            rows = sample["net_input"]["src_tokens"].tolist()
            tokens = [[words[i] for i in row if i not in (words.pad(), words.eos())] for row in rows]
            longest = int(args.max_len_a * len(rows[0]) + args.max_len_b)
            options = {"beam_size": args.beam, "num_hypotheses": args.beam, "max_decoding_length": longest}
            translator.translate_batch(tokens, **options)

    return decode


def marian_search(args, folder, state, task):
    why = marian.obstacle(state)
    if why:
        print(f"{MARIAN} is left out: {why}")
        return None
    marian.write_model(state, task.source_dictionary, folder)
    if args.marian_updates:
        task.load_dataset("train")
        data, words = task.dataset("train"), task.source_dictionary
        drawn = np.random.default_rng(1).permutation(len(data))[: 64 * args.marian_updates]
        pairs = ((data[i]["source"], data[i]["target"]) for i in drawn)
        marian.adapt(folder, state, [[words.string(each) for each in pair] for pair in pairs], args.marian_updates)
    return marian.search(folder, task.source_dictionary, args.beam)


def per_word(times, found, expected, words):
    """The seconds of Marian for as many words as the best hypotheses of stock have."""
    theirs = [words.string(each[0]["tokens"]).split() for each in expected]
    same, lengths = sum(a == b for a, b in zip(found, theirs)), [sum(map(len, each)) for each in (found, theirs)]
    print(
        f"{MARIAN}: {same} of {len(found)} best hypotheses are stock's, {lengths[0]} words and {lengths[1]}", flush=True
    )
    ends = len(found)
    return [each.per((lengths[0] + ends) / (lengths[1] + ends)) for each in times]


def require_same(stock, ours):
    for theirs, mine in zip(stock, ours):
        for one, other in zip(theirs, mine):
            assert torch.equal(one["tokens"], other["tokens"])
            torch.testing.assert_close(one["score"], other["score"], rtol=0, atol=1e-5)


def searches(args, folder):
    """The task, and ``decode(samples)`` of each way by its name."""
    model, task, ours = fairseq_search(args, args.checkpoint)
    exports = {}
    if any(isinstance(module, Halting) for module in model.modules()):
        stock = fairseq_search(args, args.checkpoint, SequenceGenerator)[2]
    else:
        plain, to = os.path.join(folder, "plain.pt"), os.path.join(folder, "ct2")
        state = unroll_checkpoint(load_checkpoint(args.checkpoint))
        save_checkpoint(state, plain)
        stock = fairseq_search(args, plain, SequenceGenerator)[2]
        for kind in ("float32", "int8"):
            exports[f"CTranslate2 {kind}"] = ctranslate2_search(args, to, state, task.source_dictionary, kind)
        exports[MARIAN] = marian_search(args, os.path.join(folder, "marian"), state, task)
    runs = {"stock": stock, "ours, torch": on("torch", ours)}
    backend, why = OP.choose("cpu", torch.float32)
    if backend == "native":
        print_speeds(model, args.beam, args.batch_sizes)
        runs["ours, native"] = on("native", ours)
        for name, overrides in {INT8: {"int8": True}, **dict(args.also)}.items():
            try:
                runs[name] = on("native", fairseq_search(args, args.checkpoint, **overrides)[2])
            except UsageError as error:
                print(f"{name} is left out: {error}")
    else:
        print(f"native steps are left out: {why}")
    runs.update({name: export for name, export in exports.items() if export})
    return task, runs


def tried(name, decode, samples, expected):
    """Whether a way decodes these; ours must find what stock finds, other weights or depths may find others."""
    if name in EXACT:
        require_same(expected, decode(samples))
    elif name.startswith("ours"):
        try:
            found = decode(samples)
        except UsageError as error:
            print(f"{name} is left out: {error}")
            return False
        others = sum(not torch.equal(a[0]["tokens"], b[0]["tokens"]) for a, b in zip(expected, found))
        print(f"{name}: {others} of {len(found)} best hypotheses are not stock's", flush=True)
    return True


def also(text):
    """NAME=OVERRIDES"""
    name, _, overrides = text.partition("=")
    try:
        overrides = ast.literal_eval(overrides)
    except (ValueError, SyntaxError):
        overrides = None
    if not name or not isinstance(overrides, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME={{'FLAG': VALUE, ...}}")
    return f"ours, native, {name}", overrides


def parse():
    parser = Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("data", help="folder of fairseq-preprocess")
    parser.add_argument("checkpoint", help="of a shared_transformer")
    parser.add_argument("--beam", type=Range(int, 1, 1000), default=5)
    parser.add_argument("--max-len-a", type=Range(float, 0, 100), default=0.0, help="as of fairseq-generate")
    parser.add_argument("--max-len-b", type=Range(int, 1, 1000), default=200)
    parser.add_argument("--batch-sizes", type=BATCH, nargs="+", default=[1, 64])
    parser.add_argument("--sentences", type=COUNT, default=192, help="of the test set, a round (an eighth at batch 1)")
    parser.add_argument("--rounds", type=ROUNDS, default=5, help="how often all are measured in turn")
    parser.add_argument(
        "--also",
        type=also,
        nargs="+",
        default=[],
        metavar="NAME=OVERRIDES",
        help="ours, native, with other flags of the model: never=\"{'halting': 'saturation', 'halting_threshold': 1.0}\"",
    )
    parser.add_argument("--marian-updates", type=UPDATES, default=100, help="of Marian, to know its own positions")
    parser.add_argument("--cpu-time", action="store_true", help="of this process, for busy machines")
    add_json(parser)
    return parser.parse_args()


def main():
    args = parse()
    record, by = describe(args), CLOCKS[args.cpu_time]
    with tempfile.TemporaryDirectory() as folder:
        task, all_runs = searches(args, folder)
    task.load_dataset("test")
    data = task.dataset("test")
    for batch_size in args.batch_sizes:
        count = min(max(args.sentences // 8, 1) if batch_size == 1 else args.sentences, len(data))
        order = data.ordered_indices()[:: len(data) // count][:count].tolist()
        samples = [data.collater([data[i] for i in order[k : k + batch_size]]) for k in range(0, count, batch_size)]
        print(f"batch {batch_size}", flush=True)
        expected = all_runs["stock"](samples)
        runs = {name: decode for name, decode in all_runs.items() if tried(name, decode, samples, expected)}
        times = in_turn({name: lambda decode=decode: decode(samples) for name, decode in runs.items()}, args.rounds)
        if MARIAN in runs:
            times[MARIAN] = per_word(times[MARIAN], runs[MARIAN](samples), expected, task.target_dictionary)
        record.add(f"{count} sentences, beam {args.beam}, batch {batch_size}", times, "stock", sentences=count)
        for name, measured in times.items():
            faster = ratios(times["stock"], measured, by)
            print(
                f"sentences/s, beam {args.beam}, batch {batch_size}: {name} {count / median(measured, by):.1f}, "
                f"ratio {statistics.median(faster):.2f} (rounds {faster[0]:.2f} to {faster[-1]:.2f})",
                flush=True,
            )
    record.write()


if __name__ == "__main__":
    run(main)

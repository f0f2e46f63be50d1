"""Stock fairseq's Transformer and ours with the same weights and depth, on the same data, measured in turn."""

import argparse
import logging
import platform
import statistics
import warnings

import torch
from fairseq import options, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from record import Record, add_json, median, ratios, said

import fairseq_adaptive.plugin  # noqa: F401  registers our models
from fairseq_adaptive.ranges import ROUNDS, Parser

logging.disable(logging.INFO)
warnings.filterwarnings("ignore")


def parser(description):
    parser = Parser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("data", help="folder of fairseq-preprocess with a joined dictionary")
    parser.add_argument("--source-lang", default="en")
    parser.add_argument("--target-lang", default="de")
    parser.add_argument("--layer-sharing", default="cycle_rev")
    parser.add_argument("--unique-layers", default="3")
    parser.add_argument("--layers", default="6", help="depths of both models, in encoder and decoder")
    parser.add_argument("--embed-dim", default="128")
    parser.add_argument("--ffn-embed-dim", default="256")
    parser.add_argument("--attention-heads", default="4")
    parser.add_argument("--rounds", type=ROUNDS, default=7, help="how often the two are measured in turn")
    add_json(parser)
    return parser


def build_pair(args, *flags, ours=()):
    """Return ``(cfg, task, model)`` of stock fairseq and of ours; both compute the same function.

    Args:
        args: of :func:`parser`
        flags: of fairseq-train for both
        ours: more of them for ours alone
    """
    shape = []
    for side in ("encoder", "decoder"):
        for name in ("layers", "embed_dim", "ffn_embed_dim", "attention_heads"):
            shape += [f"--{side}-{name.replace('_', '-')}", getattr(args, name)]
    sharing = ["--layer-sharing", args.layer_sharing]
    sharing += ["--encoder-unique-layers", args.unique_layers, "--decoder-unique-layers", args.unique_layers]
    pair = []
    for arch, extra in (("transformer", []), ("shared_transformer", [*sharing, *ours])):
        command = [args.data, "--task", "translation", "-s", args.source_lang, "-t", args.target_lang, "--arch", arch]
        command += ["--share-all-embeddings", "--cpu", "--num-workers", "0", *shape, *flags, *extra]
        cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(options.get_training_parser(), command))
        task = tasks.setup_task(cfg.task)
        torch.manual_seed(1)
        pair.append((cfg, task, task.build_model(cfg.model)))
    stock, ours = (model for _, _, model in pair)
    state = {name: tensor for name, tensor in ours.state_dict().items() if ".layers." not in name}
    for side in ("encoder", "decoder"):
        for depth, layer in enumerate(getattr(stock, side).layers):
            for name, tensor in getattr(ours, side).layers[depth].state_dict().items():
                state[f"{side}.layers.{depth}.{name}"] = tensor
    stock.load_state_dict(state)
    return pair


def compare(record, name, measure, rounds, by):
    """Print updates per second of ``measure(0)`` (stock) and ``measure(1)`` (ours), which return seconds of an update.

    Args:
        record: gets them, too
        by: the clock, of :data:`record.CLOCKS`
    """
    measure(0), measure(1)
    stock, ours = zip(*((measure(0), measure(1)) for _ in range(rounds)))
    record.add(name, {"stock": stock, "ours": ours}, "stock")
    faster = ratios(stock, ours, by)
    print(
        f"updates/s, {name}: stock {1 / median(stock, by):.2f}, ours {1 / median(ours, by):.2f}, "
        f"ratio {statistics.median(faster):.2f} (rounds {faster[0]:.2f} to {faster[-1]:.2f})",
        flush=True,
    )


def describe(args):
    """Print where this runs and how it was called; return what ``--json`` asks for, a :class:`record.Record`."""
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(said())
    return Record(getattr(args, "json", None))

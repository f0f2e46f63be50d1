"""Transformer-XL of kimiyoung/transformer-xl and of Hugging Face's TransfoXL to ``par_transformer_xl``.

The originals number words by frequency from 0, with ``<eos>`` and ``<unk>`` among them. fairseq's dictionaries begin
with ``<s>``, ``<pad>``, ``</s>`` and ``<unk>``. So the rows of ``<eos>`` and ``<unk>`` move to those of ``</s>`` and
``<unk>``, the other words follow in their order, and the end of each cluster moves by what was added before it: by 2
where both words were in the first cluster, where they have to be. ``<s>`` and ``<pad>``, of which the original knows
nothing, get zero embeddings and an output bias of -10000: their probability is exactly 0 in every precision, so that
all others stay what they were.

The logits of the clusters stand in their order in ours, in Hugging Face's and in the TensorFlow models that Hugging
Face publishes, but in the reverse order in kimiyoung's PyTorch code. The two are told apart by the ``transformer.``
before Hugging Face's names; ``--cluster-order`` overrules that.

A model without cutoffs gets one: its last word becomes a cluster of its own. Within it the word has probability 1, and
the cluster's logit is the word's, so this is the same softmax over all words, with the original's output bias.

Line by line, ``fairseq-preprocess --only-source --srcdict dict.txt`` ends each line with ``</s>``, as the original's
encoding does with ``<eos>``. Two differences at the beginning of a text remain: fairseq also scores the first word,
which the original only reads, and Hugging Face's code attends to a memory of zeros, where there is none here.
"""

import os
from typing import Any, Dict, Iterator, List, Tuple

import torch
from fairseq.data import Dictionary
from torch import Tensor

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.files import read_lines
from fairseq_adaptive.interop.checkpoint import load_model
from fairseq_adaptive.interop.conversion import Weights, check_numbers, new_state, read_folder
from fairseq_adaptive.interop.definitions.transfo_xl import log_probabilities
from fairseq_adaptive.modules.transformer_xl.memory import SegmentMemory
from fairseq_adaptive.modules.vocabulary.adaptive_input import cluster_ends
from fairseq_adaptive.ranges import DISTANCE, DROPOUT, FFN_WIDTH, HEADS, LAYERS, WIDTH, WORDS, Range

PREFIX = "transformer."
IMPOSSIBLE = -1e4
UNUSED = ("pos_emb.",)  # sines, computed anew
RANGES = {
    "vocab_size": WORDS,
    "d_model": WIDTH,
    "n_head": HEADS,
    "d_head": WIDTH,
    "d_inner": FFN_WIDTH,
    "n_layer": LAYERS,
    "mem_len": DISTANCE,
}
OPTIONAL = {
    "div_val": Range(int, 1, 1024),
    "d_embed": WIDTH,
    "clamp_len": Range(int, -1, DISTANCE.most),
    "dropout": DROPOUT,
    "dropatt": DROPOUT,
    "sample_softmax": Range(int, -1, WORDS.most),
    "attn_type": Range(int, 0, 3),
}
SEGMENT_LENGTH = 128  # of evaluation; the original's configuration has none
COMPARED = 6  # words of each segment that are compared with the original's


def add_args(parser) -> None:
    parser.add_argument(
        "--vocab",
        required=True,
        metavar="FILE",
        help="the vocabulary, one symbol a line in the order of their ids, with or without counts",
    )
    parser.add_argument(
        "--eos",
        default="<eos>",
        metavar="SYMBOL",
        help="the symbol that ends a line; of a model of characters, that of the line break (default: %(default)s)",
    )
    parser.add_argument(
        "--cluster-order",
        choices=("forward", "reversed"),
        help="of the clusters' logits (default: forward where names begin with transformer., as "
        "Hugging Face's, else reversed, as kimiyoung's)",
    )


def convert(args) -> Tuple[Dict[str, Any], Dictionary]:
    """Return the state of a checkpoint and its dictionary.

    Args:
        args: ``input`` (folder), ``vocab``, ``eos`` and ``cluster_order``

    Raises:
        UsageError: when files are missing, do not fit each other, or hold what ``par_transformer_xl`` cannot express
    """
    config, tensors = read_folder(args.input)
    shape = read_config(config)
    symbols, counts = read_vocabulary(args.vocab)
    if len(symbols) != shape["vocab_size"]:
        raise UsageError(
            f"{args.vocab} has {len(symbols)} symbols, but the model's vocabulary {shape['vocab_size']}: "
            "one line is one symbol, in the order of the ids"
        )
    dictionary, order, cutoffs = lay_out(symbols, counts, shape["cutoffs"], args.eos)
    source = Weights(tensors, PREFIX)
    shape["is_reversed"] = _is_reversed(args, tensors)
    shape.setdefault("untie_r", "r_w_bias" not in source)
    weights = convert_weights(source, shape, order)
    return new_state(flags(shape, cutoffs), weights), dictionary


def _is_reversed(args, names):
    if args.cluster_order:
        return args.cluster_order == "reversed"
    return not any(name.startswith(PREFIX) for name in names)


def read_config(config: Dict[str, Any]) -> Dict[str, Any]:
    """Return what the conversion needs of ``config.json``, by the names there, with ``vocab_size`` and ``tied``.

    Raises:
        UsageError: when something is missing or cannot be expressed
    """
    shape = dict(config, vocab_size=config.get("vocab_size", config.get("n_token")))
    check_numbers({name: value for name, value in shape.items() if value is not None}, RANGES, OPTIONAL)
    for name in ("same_length", "tie_weight", "tie_word_embeddings", "untie_r", "pre_lnorm"):
        if not isinstance(shape.get(name, True), (bool, int)):
            raise UsageError(f"{name} in config.json is {str(shape[name])[:40]}: it is true or false")
    cutoffs = shape.get("cutoffs", [])
    if not isinstance(cutoffs, list) or not all(cutoff in WORDS for cutoff in cutoffs):
        raise UsageError(f"cutoffs in config.json are {str(cutoffs)[:40]}: they are a list of whole numbers")
    cluster_ends(shape["vocab_size"], cutoffs)
    if not isinstance(shape.get("tie_projs", []), list):
        raise UsageError("tie_projs in config.json is no list")
    defaults = {
        "cutoffs": [],
        "div_val": 1,
        "d_embed": shape["d_model"],
        "clamp_len": -1,
        "same_length": False,
        "dropout": 0.1,
        "dropatt": 0.0,
        "tie_weight": True,
        "tie_word_embeddings": True,
    }
    shape = {**defaults, **shape}
    expressible = {"attn_type": 0, "pre_lnorm": False, "layer_norm_epsilon": 1e-5, "d_embed": shape["d_model"]}
    for name, value in expressible.items():
        if shape.get(name, value) != value:
            raise UsageError(f"config.json says {name} {shape[name]}, but only {value} can be converted")
    if shape.get("sample_softmax", -1) > 0:
        raise UsageError("config.json says sample_softmax: a model trained with a sampled softmax cannot be converted")
    if shape["div_val"] != 1 and not shape["cutoffs"]:
        raise UsageError(f"config.json says div_val {shape['div_val']} without cutoffs, which cannot be converted")
    shape["tied"] = shape["tie_weight"] and shape["tie_word_embeddings"]
    if "tie_projs" not in shape:
        shape["tie_projs"] = [False] + [shape.get("proj_share_all_but_first", False)] * len(shape["cutoffs"])
    if len(shape["tie_projs"]) != len(shape["cutoffs"]) + 1:
        raise UsageError(
            f"config.json has {len(shape['cutoffs'])} cutoffs, but {len(shape['tie_projs'])} entries in "
            "tie_projs: there is one for each cluster"
        )
    return shape


def read_vocabulary(path) -> Tuple[List[str], List[int]]:
    """Return symbols and counts, which fall from line to line; counts are made up where the file has none like that.

    Raises:
        UsageError: when the file is missing, has an empty line or a symbol twice
    """
    lines = [line.split() for line in read_lines(path)]
    seen = {}
    for number, line in enumerate(lines, 1):
        if not line:
            raise UsageError(f"line {number} of {path} is empty: one line is one symbol")
        if line[0] in seen:
            raise UsageError(f"lines {seen[line[0]]} and {number} of {path} are both {line[0]!r}")
        seen[line[0]] = number
    counts = [int(line[1]) for line in lines if len(line) == 2 and line[1].isdecimal()]
    if len(counts) < len(lines) or counts != sorted(counts, reverse=True):
        counts = list(range(len(lines), 0, -1))
    return list(seen), counts


def lay_out(symbols: List[str], counts: List[int], cutoffs: List[int], eos: str):
    """Give the original's words fairseq's ids.

    Returns:
        the dictionary; for each of its ids the original's id, -1 for none; and the cutoffs in the new ids

    Raises:
        UsageError: when there is no end of line, or a special symbol is not in the first cluster
    """
    dictionary = Dictionary()
    if eos not in symbols:
        raise UsageError(f"the vocabulary has no symbol {eos!r} for the end of a line: name it with --eos")
    order = [-1] * dictionary.nspecial
    for number, symbol in enumerate(symbols):
        place = dictionary.eos() if symbol == eos else dictionary.indices.get(symbol)
        if place is None:
            continue
        if order[place] >= 0:
            raise UsageError(f"{symbols[order[place]]!r} and {symbol!r} are both fairseq's {dictionary[place]!r}")
        if cutoffs and number >= cutoffs[0]:
            raise UsageError(f"{symbol!r} is not in the first cluster, where fairseq's {dictionary[place]!r} has to be")
        order[place] = number
    moved = set(order)
    for number, (symbol, count) in enumerate(zip(symbols, counts, strict=True)):
        if number not in moved:
            dictionary.add_symbol(symbol, n=count)
            order.append(number)
    more = len(order) - len(symbols)
    return dictionary, order, [cutoff + more for cutoff in cutoffs] or [len(order) - 1]


def flags(shape: Dict[str, Any], cutoffs: List[int]) -> List[str]:
    """The flags of fairseq-train for such a model."""
    values = {
        "task": "segmented_language_modeling",
        "tokens-per-sample": SEGMENT_LENGTH,
        "arch": "par_transformer_xl",
        "criterion": "adaptive_cross_entropy",
        "layout": f"af*{shape['n_layer']}",
        "decoder-embed-dim": shape["d_model"],
        "decoder-ffn-embed-dim": shape["d_inner"],
        "decoder-attention-heads": shape["n_head"],
        "decoder-head-dim": shape["d_head"],
        "dropout": shape["dropout"],
        "activation-dropout": shape["dropout"],
        "attention-dropout": shape["dropatt"],
        "memory-length": shape["mem_len"],
        "clamp-length": max(shape["clamp_len"], 0),
        "adaptive-softmax-cutoff": ",".join(map(str, cutoffs)),
        "adaptive-softmax-factor": shape["div_val"],
    }
    switches = {
        "same-length": shape["same_length"],
        "untie-relative-bias": shape["untie_r"],
        "share-decoder-input-output-embed": shape["tied"],
        "tie-adaptive-proj": _ties_projections(shape),
    }
    given = [f"--{name}={value}" for name, value in values.items()]
    return given + [f"--{name}" for name, on in switches.items() if on]


def _ties_projections(shape):
    # other patterns become projections of their own with equal values
    usual = [False] + [True] * len(shape["cutoffs"])
    return shape["tied"] and shape["div_val"] != 1 and shape["tie_projs"] == usual


def convert_weights(source: Weights, shape: Dict[str, Any], order: List[int]) -> Dict[str, Tensor]:
    """Return the weights of ``par_transformer_xl``.

    Args:
        source: the original's
        shape: of :func:`read_config`, with ``untie_r`` and ``is_reversed``
        order: the original's id of each of fairseq's, -1 for none

    Raises:
        UsageError: when a tensor is missing or of another shape
    """
    target = {}
    _convert_vocabulary(source, shape, torch.tensor(order), target)
    dim, inner = shape["d_model"], shape["n_head"] * shape["d_head"]
    for layer in range(shape["n_layer"]):
        attention, feed_forward = (f"decoder.blocks.{2 * layer + number}." for number in (0, 1))
        old, own = f"layers.{layer}.dec_attn.", f"{attention}attention."
        target[own + "qkv_proj.weight"] = source.take(old + "qkv_net.weight", 3 * inner, dim)
        target[own + "position_proj.weight"] = source.take(old + "r_net.weight", inner, dim)
        target[own + "out_proj.weight"] = source.take(old + "o_net.weight", dim, inner)
        for ours, theirs in ("content_bias", "r_w_bias"), ("position_bias", "r_r_bias"):
            names = [old + theirs] if shape["untie_r"] else [theirs, old + theirs]
            target[own + ours] = source.take(names, shape["n_head"], shape["d_head"])
        old_ff = f"layers.{layer}.pos_ff."
        for number, ours, size in (0, "fc1", (shape["d_inner"], dim)), (3, "fc2", (dim, shape["d_inner"])):
            target[f"{feed_forward}{ours}.weight"] = source.take(f"{old_ff}CoreNet.{number}.weight", *size)
            target[f"{feed_forward}{ours}.bias"] = source.take(f"{old_ff}CoreNet.{number}.bias", size[0])
        for ours, theirs in (attention, old), (feed_forward, old_ff):
            for kind in ("weight", "bias"):
                target[f"{ours}layer_norm.{kind}"] = source.take(f"{theirs}layer_norm.{kind}", dim)
    more = sorted(name for name in source.left if name.startswith(f"layers.{shape['n_layer']}."))
    if more:
        raise UsageError(f"the weights hold {more[0]}, but by config.json there are only {shape['n_layer']} layers")
    source.require_used(UNUSED)
    return target


def _convert_vocabulary(source, shape, order, target):
    """Fill in embeddings and softmax; ``order`` is ``[V]``, -1 for words that the original has not."""
    dim, cutoffs = shape["d_model"], shape["cutoffs"]
    ends = [*cutoffs, shape["vocab_size"]]
    sizes = [end - start for start, end in zip([0, *ends], ends)]
    if shape["div_val"] == 1:
        sizes = [shape["vocab_size"]]
    widths = [dim // shape["div_val"] ** number for number in range(len(sizes))]
    # only the rows of the first table move: special symbols are in its cluster
    first = order[: len(order) - shape["vocab_size"] + sizes[0]]

    def with_specials(rows, missing=0.0):
        moved = rows[first.clamp(min=0)]
        moved[first < 0] = missing
        return moved

    embed, softmax = "decoder.embed_tokens.", "decoder.adaptive_softmax."
    biases = []
    for number, (size, width) in enumerate(zip(sizes, widths)):
        inputs, outputs = f"word_emb.emb_layers.{number}.weight", f"crit.out_layers.{number}.weight"
        table = source.take([inputs, outputs] if shape["tied"] else inputs, size, width)
        output = None if shape["tied"] else source.take(outputs, size, width)
        bias = source.take(f"crit.out_layers.{number}.bias", size)
        if number == 0:
            table, bias = with_specials(table), with_specials(bias, IMPOSSIBLE)
            output = None if output is None else with_specials(output)
        target[f"{embed}tables.{number}"] = table
        target[f"{softmax}tables.{number}"] = table if output is None else output
        biases.append(bias)
        if shape["div_val"] != 1:
            inputs, outputs = f"word_emb.emb_projs.{number}", f"crit.out_projs.{number}"
            tied = shape["tie_projs"][number]
            projection = source.take([inputs, outputs] if tied else inputs, dim, width)
            target[f"{embed}projections.{number}"] = projection
            target[f"{softmax}projections.{number}"] = projection if tied else source.take(outputs, dim, width)
    target[softmax + "bias"] = torch.cat(biases)
    if cutoffs:
        for kind, size in ("weight", (len(cutoffs), dim)), ("bias", (len(cutoffs),)):
            clusters = source.take(f"crit.cluster_{kind}", *size)
            target[f"{softmax}cluster_{kind}"] = clusters.flip(0) if shape["is_reversed"] else clusters
    else:
        target[softmax + "cluster_weight"] = target[softmax + "tables.0"][-1:].clone()
        target[softmax + "cluster_bias"] = target[softmax + "bias"][-1:].clone()


def outputs(args, folder) -> Iterator[Tuple[str, Tensor, Tensor]]:
    """Compare the converted model with the definition of the original: log-probabilities of all words after each word of
    two short segments, the second with a memory of the first; of more, where there are more clusters than words.

    Args:
        args: of :func:`convert`
        folder: with ``checkpoint.pt`` and ``dict.txt``

    Yields:
        what computes, what it found, and what the original computes
    """
    model, task = load_model(os.path.join(folder, "checkpoint.pt"), {"data": folder})
    config, tensors = read_folder(args.input)
    symbols, _ = read_vocabulary(args.vocab)
    index, eos = task.source_dictionary.index, task.source_dictionary.eos()
    ours = torch.tensor([eos if symbol == args.eos else index(symbol) for symbol in symbols])

    ends = [*config.get("cutoffs", []), len(symbols)]
    clusters = list(zip([0, *ends], ends))
    generator, words = torch.Generator().manual_seed(1), [symbols.index(args.eos)]
    for number in range(max(2 * COMPARED - 1, len(clusters))):
        words.append(int(torch.randint(*clusters[number % len(clusters)], (), generator=generator)))
    expected = log_probabilities(tensors, config, words, COMPARED, _is_reversed(args, tensors))
    memory, found = SegmentMemory(), []
    model.eval()
    for segment in ours[words].unsqueeze(0).split(COMPARED, 1):
        found.append(model.get_normalized_probs(model(segment, memory=memory), log_probs=True)[0])
    yield "the converted model", torch.cat(found)[:, ours], expected

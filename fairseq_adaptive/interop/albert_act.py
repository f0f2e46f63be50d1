"""ALBERT-ACT as published on Hugging Face (asi/albert-act-base and its family) to ``albert_act``, and back.

The published models number their pieces ``<pad>`` 0, ``<unk>`` 1, ``[CLS]`` 2, ``[SEP]`` 3; fairseq's dictionaries
begin with ``<s>``, ``<pad>``, ``</s>`` and ``<unk>``. So these four rows move, ``[MASK]`` becomes ``<mask>``, and all others
stay where they are.
"""

import json
import os
from argparse import Namespace
from functools import partial
from typing import Any, Dict, Iterator, List, Tuple

import torch
from fairseq.data import Dictionary
from torch import Tensor

from fairseq_adaptive.data.albert_tokenizer import FILE, AlbertTokenizer
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.files import require_new, whole_folder
from fairseq_adaptive.interop.checkpoint import load_checkpoint, load_model, model_options, save_tensors
from fairseq_adaptive.interop.conversion import (
    Weights,
    check_heads,
    check_numbers,
    new_state,
    read_folder,
    require_outputs,
)
from fairseq_adaptive.interop.definitions import albert_act as definition
from fairseq_adaptive.interop.verifying import clear_cut, draw_text, numbered_dictionary
from fairseq_adaptive.models.albert_act import AlbertActEncoder, albert_act_base
from fairseq_adaptive.ranges import DROPOUT, INHERITED, WIDTH, WORDS, Range

PREFIX = "albert."
ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_accurate", "relu": "relu"}
SPECIAL = {"pad_token_id": 0, "unk_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}

# fairseq's flags by the names in config.json
FLAGS = {
    "num_hidden_layers": "encoder_layers",
    "embedding_size": "encoder_input_dim",
    "hidden_size": "encoder_embed_dim",
    "intermediate_size": "encoder_ffn_embed_dim",
    "num_attention_heads": "encoder_attention_heads",
    "max_position_embeddings": "max_positions",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
    "classifier_dropout_prob": "pooler_dropout",
}
RANGES = {name: INHERITED.get(flag, WIDTH) for name, flag in FLAGS.items()}
RANGES.update(vocab_size=WORDS, act_epsilon=DROPOUT)
# what cannot be expressed otherwise
FIXED = {
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "num_hidden_groups": 1,
    "inner_group_num": 1,
    "position_embedding_type": "absolute",
}

_LAYER = "encoder.albert_layer."
_MODULES = {
    "encoder.layernorm_embedding": "embeddings.LayerNorm",
    "encoder.project_in_dim": "encoder.embedding_hidden_mapping_in",
    "encoder.layers.0.self_attn.q_proj": _LAYER + "attention.query",
    "encoder.layers.0.self_attn.k_proj": _LAYER + "attention.key",
    "encoder.layers.0.self_attn.v_proj": _LAYER + "attention.value",
    "encoder.layers.0.self_attn.out_proj": _LAYER + "attention.dense",
    "encoder.layers.0.self_attn_layer_norm": _LAYER + "LayerNorm",
    "encoder.layers.0.fc1": _LAYER + "ffn",
    "encoder.layers.0.fc2": _LAYER + "ffn_output",
    "encoder.layers.0.final_layer_norm": _LAYER + "full_layer_layer_norm",
    "encoder.layers.halting.unit": _LAYER + "act.dense",
    "encoder.pooler": "pooler",
    "encoder.lm_head.dense": "predictions.dense",
    "encoder.lm_head.layer_norm": "predictions.LayerNorm",
    "encoder.sentence_order_head": "sop_classifier.classifier",
}
NAMES = {
    "encoder.embed_tokens.weight": "embeddings.word_embeddings.weight",
    "encoder.embed_positions.weight": "embeddings.position_embeddings.weight",
    "encoder.embed_segments.weight": "embeddings.token_type_embeddings.weight",
    **{f"{ours}.{kind}": f"{theirs}.{kind}" for ours, theirs in _MODULES.items() for kind in ("weight", "bias")},
    "encoder.lm_head.bias": "predictions.bias",
}
BY_WORD = ("encoder.embed_tokens.weight", "encoder.lm_head.bias")
TIED = "encoder.lm_head.weight"  # with the embeddings
UNUSED = ("embeddings.position_ids", "embeddings.token_type_ids")
_HEADS = ("encoder.lm_head.", "encoder.sentence_order_head.")


def add_args(parser) -> None:
    parser.add_argument(
        "--spm",
        metavar="FILE",
        help="the SentencePiece model (default: spiece.model in the folder); "
        "from a checkpoint, that of its training text, to be written beside the weights",
    )


def convert(args) -> Tuple[Dict[str, Any], Dictionary]:
    """Return the state of a checkpoint and its dictionary.

    Args:
        args: ``input`` (folder) and ``spm``

    Raises:
        UsageError: when files are missing, do not fit each other, or hold what ``albert_act`` cannot express
    """
    config, tensors = read_folder(args.input)
    options = read_config(config)
    dictionary = dictionary_of(AlbertTokenizer(args.spm or os.path.join(args.input, FILE)), config)
    flags = ["--task", "masked_lm", "--arch", "albert_act_base", "--cpu"]
    for name, value in options.items():
        flags += ["--" + name.replace("_", "-"), value]
    return new_state(flags, convert_weights(tensors, config)), dictionary


def read_config(config: Dict[str, Any]) -> Dict[str, Any]:
    """Return the flags of ``albert_act`` that ``config.json`` amounts to.

    Raises:
        UsageError: when something is missing or cannot be expressed
    """
    for name, value in FIXED.items():
        if config.get(name, value) != value:
            raise UsageError(f"config.json says {name} {config[name]}, but only {value} can be converted")
    check_numbers(config, RANGES)
    check_numbers(config, {}, dict.fromkeys(SPECIAL, Range(int, 0, config["vocab_size"] - 1)))
    check_heads(config["hidden_size"], config["num_attention_heads"])
    if len({config.get(name, number) for name, number in SPECIAL.items()}) < len(SPECIAL):
        raise UsageError(f"{', '.join(SPECIAL)} in config.json are not four different numbers")
    if config.get("hidden_act", "gelu") not in tuple(ACTIVATIONS):
        raise UsageError(f"config.json says hidden_act {config['hidden_act']}: known are {', '.join(ACTIVATIONS)}")
    return {
        **{flag: config[name] for name, flag in FLAGS.items()},
        "activation_fn": ACTIVATIONS[config.get("hidden_act", "gelu")],
        "halting": "act",
        "halting_threshold": 1.0 - config["act_epsilon"],
    }


def row_order(config: Dict[str, Any]) -> List[int]:
    """The published number of each entry of fairseq's dictionary."""
    first = [config.get(f"{name}_token_id", SPECIAL[f"{name}_token_id"]) for name in ("bos", "pad", "eos", "unk")]
    return first + [number for number in range(config["vocab_size"]) if number not in first]


def dictionary_of(tokenizer: AlbertTokenizer, config: Dict[str, Any]) -> Dictionary:
    """fairseq's dictionary of a published vocabulary.

    Raises:
        UsageError: when the tokenizer is not that of the model
    """
    pieces, name = tokenizer.pieces, tokenizer.path
    if len(pieces) != config["vocab_size"]:
        raise UsageError(
            f"{name} has {len(pieces)} pieces, but the model a vocabulary of {config['vocab_size']}: "
            "it is not the tokenizer of this model"
        )
    dictionary = Dictionary()
    for number in row_order(config)[4:]:
        dictionary.add_symbol("<mask>" if pieces[number] == "[MASK]" else pieces[number])
    if len(dictionary) != len(pieces):
        raise UsageError(
            f"{name} has pieces that fairseq's dictionary holds already, such as <s>: it is not the "
            "tokenizer of this model"
        )
    return dictionary


def convert_weights(tensors: Dict[str, Tensor], config: Dict[str, Any]) -> Dict[str, Tensor]:
    """Published weights under the names of ``albert_act``; heads that the file lacks start anew.

    Args:
        tensors: as published, of the body alone (``AlbertActModel``) or with the heads of pretraining
        config: ``config.json``

    Raises:
        UsageError: when weights are missing or do not fit ``config.json``
    """
    source, order = Weights(tensors, PREFIX), torch.tensor(row_order(config))
    shapes = _shapes(config)
    weights = {}
    for ours, theirs in NAMES.items():
        if ours.startswith(_HEADS) and theirs not in source:
            tensor = torch.ones(shapes[ours]) if "layer_norm.weight" in ours else torch.zeros(shapes[ours])
            weights[ours] = tensor.normal_(std=0.02) if tensor.dim() == 2 else tensor
            continue
        tensor = source.take(theirs, *shapes[ours])
        weights[ours] = tensor[order] if ours in BY_WORD else tensor.clone()
    source.require_used(UNUSED)
    weights[TIED] = weights[BY_WORD[0]]
    return weights


def _shapes(config):
    args = Namespace(**read_config(config))
    albert_act_base(args)
    with torch.device("meta"):
        encoder = AlbertActEncoder(args, numbered_dictionary(config["vocab_size"]))
    return {f"encoder.{name}": tuple(tensor.shape) for name, tensor in encoder.state_dict().items()}


def convert_back(args) -> None:
    """Write a checkpoint of ``albert_act`` as a folder in the published layout: ``config.json``, ``pytorch_model.bin``
    and, where it is given, the tokenizer.

    Args:
        args: ``input`` (a fairseq checkpoint), ``output`` (the new folder), and ``spm`` or None

    Raises:
        UsageError: for a checkpoint of another model or halting rule, a tokenizer that is not that of the model, or
            when the output exists
    """
    output, state = require_new(args.output), load_checkpoint(args.input)
    options = model_options(state)
    if not str(options["_name"]).startswith("albert_act") or options.get("halting") != "act":
        raise UsageError(f"{args.input} is no albert_act model with --halting act, which alone fits that layout")
    weights = state["model"]
    options["max_positions"] = weights["encoder.embed_positions.weight"].size(0)  # the flag may be left to the task
    config = {name: options[flag] for name, flag in FLAGS.items()}
    config.update(FIXED, **SPECIAL, vocab_size=weights[BY_WORD[0]].size(0), model_type="albert_act")
    threshold = options.get("halting_threshold")
    config["act_epsilon"] = round(1 - (0.99 if threshold is None else threshold), 10)
    names = {flag: name for name, flag in ACTIVATIONS.items()}
    config["hidden_act"] = names.get(options["activation_fn"])
    if config["hidden_act"] is None:
        raise UsageError(f"--activation-fn {options['activation_fn']} does not fit the published layout")
    tokenizer = AlbertTokenizer(args.spm) if args.spm else None
    if tokenizer is not None:
        dictionary_of(tokenizer, config)
    tensors = published_weights(weights, config)
    tensors["predictions.decoder.weight"] = tensors[PREFIX + NAMES[BY_WORD[0]]]
    tensors["predictions.decoder.bias"] = tensors["predictions.bias"]
    with whole_folder(output) as made:
        with open(os.path.join(made, "config.json"), "w", encoding="utf-8") as file:
            json.dump(config, file, indent=2)
        save_tensors(tensors, os.path.join(made, "pytorch_model.bin"))
        if tokenizer is not None:
            tokenizer.save(made)
        require_outputs(_outputs_back(made, state))


def published_weights(weights: Dict[str, Tensor], config: Dict[str, Any]) -> Dict[str, Tensor]:
    """The weights of ``albert_act`` under the published names, without copies of tied ones: :func:`convert_weights`
    backwards."""
    back, tensors = torch.tensor(row_order(config)).argsort(), {}
    for ours, theirs in NAMES.items():
        tensor = weights[ours].cpu()
        name = theirs if theirs.startswith(("predictions", "sop_")) else PREFIX + theirs
        tensors[name] = tensor[back] if ours in BY_WORD else tensor.clone()
    return tensors


def write_published(folder, config: Dict[str, Any], weights: Dict[str, Tensor], tokenizer=None) -> None:
    """Write a new folder in the published layout with ``model.safetensors``.

    Args:
        folder: must not exist
        config: ``config.json``
        weights: of ``albert_act``
        tokenizer: whose files are written, too

    Raises:
        UsageError: when it exists or cannot be written
    """
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise UsageError("to write model.safetensors, install safetensors: pip install safetensors") from error
    with whole_folder(folder) as made:
        with open(os.path.join(made, "config.json"), "w", encoding="utf-8") as file:
            json.dump(config, file, indent=2)
        save_file(published_weights(weights, config), os.path.join(made, "model.safetensors"), {"format": "pt"})
        if tokenizer is not None:
            tokenizer.save(made)


def _outputs_back(folder, state):
    """What the written folder is by the definition of the original, beside the model in the checkpoint."""
    config, tensors = read_folder(folder)
    convert_weights(tensors, config)  # it can be converted again
    args = Namespace(**model_options(state))
    albert_act_base(args)
    args.max_positions = config["max_position_embeddings"]
    encoder = AlbertActEncoder(args, numbered_dictionary(config["vocab_size"]))
    names = {
        name.removeprefix("encoder."): each for name, each in state["model"].items() if name.startswith("encoder.")
    }
    encoder.load_state_dict(names, strict=True)
    # fairseq's numbers of <pad>, <unk>, [CLS] and [SEP], which are written as 0 to 3; those of pieces are the same
    ours = torch.tensor([1, 3, 0, 2, *range(4, config["vocab_size"])])
    for what, found, expected in _compared(encoder, config, tensors, ours):
        yield what.format("what is read from the folder"), expected, found


def outputs(args, folder) -> Iterator[Tuple[str, Tensor, Tensor]]:
    """Compare the converted model with the definition of the original on a short text: its states, and the heads that the
    original has.

    Args:
        args: of :func:`convert`
        folder: with ``checkpoint.pt`` and ``dict.txt``

    Yields:
        what computes, what it found, and what the original computes
    """
    model, task = load_model(os.path.join(folder, "checkpoint.pt"), {"data": folder})
    config, tensors = read_folder(args.input)
    pieces = AlbertTokenizer(args.spm or os.path.join(args.input, FILE)).pieces
    named = {number: "<mask>" for number, piece in enumerate(pieces) if piece == "[MASK]"}
    for name, symbol in ("bos", "<s>"), ("pad", "<pad>"), ("eos", "</s>"), ("unk", "<unk>"):
        named[config.get(f"{name}_token_id", SPECIAL[f"{name}_token_id"])] = symbol
    index = task.source_dictionary.index
    ours = torch.tensor([index(named.get(number, piece)) for number, piece in enumerate(pieces)])
    for what, found, expected in _compared(model.encoder, config, tensors, ours):
        yield what.format("the converted model"), found, expected


def _compared(encoder, config, tensors, ours):
    """Our encoder beside the definition; ``ours`` [V] are fairseq's numbers of words."""
    pad, unk, start, end = (config.get(name, number) for name, number in SPECIAL.items())
    others = [number for number in range(len(ours)) if number not in (pad, unk, start, end)]

    def types(text):
        return [int(end in text[:place]) for place in range(len(text))]

    draw = partial(
        draw_text, start=start, end=end, always=[unk], others=others, longest=min(12, config["max_position_embeddings"])
    )
    text, original = clear_cut(draw, lambda text: definition.encode(tensors, config, text, types(text)))
    expected = definition.heads(tensors, config, original.states)
    ids, segments = ours[text].unsqueeze(0), torch.tensor([types(text)])
    states, extra = encoder.eval()(ids, features_only=True, segments=segments)
    yield "{}", states[0], original.states
    yield "the pooler of {}", extra["pooled"][0], expected["pooled"]
    if "words" in expected:
        yield "the word head of {}", encoder.lm_head(states)[0][:, ours], expected["words"]
    if "order" in expected:
        yield "the head of sentence order of {}", encoder.sentence_order_head(extra["pooled"])[0], expected["order"]

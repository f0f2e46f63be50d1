"""BERT, RoBERTa and Transkimmer folders of Hugging Face's layout to ``transkimmer``.

BERT's ``[CLS]``, ``[PAD]``, ``[SEP]``, ``[UNK]`` and ``[MASK]`` become fairseq's ``<s>``, ``<pad>``, ``</s>``,
``<unk>`` and ``<mask>``; the first four move to the front, all others keep their order. RoBERTa's are there already.
Its only token type is added to the positions, which changes nothing. The pooler, which pretraining used, is left out,
but a sentence classifier on top of it becomes ``sentence_classification_head``, and a span classifier the span head.
"""

import os
from functools import partial
from typing import Any, Dict, Iterator, List, Tuple

import torch
from fairseq.data import Dictionary
from torch import Tensor

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.files import read_json, read_lines
from fairseq_adaptive.interop.checkpoint import load_checkpoint, load_model
from fairseq_adaptive.interop.conversion import Weights, check_heads, check_numbers, new_state, read_folder
from fairseq_adaptive.interop.definitions import bert as definition
from fairseq_adaptive.interop.verifying import clear_cut, draw_text
from fairseq_adaptive.ranges import INHERITED, POSITIONS, POSITIVE_SHARE, WORDS, Range

ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_accurate", "gelu_pytorch_tanh": "gelu_accurate", "relu": "relu"}
SPECIAL = {
    "bert": ("[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"),
    "roberta": ("<s>", "<pad>", "</s>", "<unk>", "<mask>"),
}
POSITION_OFFSET = 2  # fairseq counts positions from one above the number of <pad>
FLAGS = {
    "num_hidden_layers": "encoder-layers",
    "hidden_size": "encoder-embed-dim",
    "intermediate_size": "encoder-ffn-embed-dim",
    "num_attention_heads": "encoder-attention-heads",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention-dropout",
    "layer_norm_eps": "layer-norm-eps",
}
RANGES = {name: INHERITED.get(flag.replace("-", "_"), POSITIVE_SHARE) for name, flag in FLAGS.items()}
RANGES.update(vocab_size=WORDS, max_position_embeddings=POSITIONS)
BODY = "encoder.sentence_encoder."
_LAYER = {
    "self_attn.q_proj": "attention.self.query",
    "self_attn.k_proj": "attention.self.key",
    "self_attn.v_proj": "attention.self.value",
    "self_attn.out_proj": "attention.output.dense",
    "self_attn_layer_norm": "attention.output.LayerNorm",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
    "final_layer_norm": "output.LayerNorm",
}
_HEADS = {
    "bert": {
        "dense": "cls.predictions.transform.dense",
        "layer_norm": "cls.predictions.transform.LayerNorm",
        "bias": ("cls.predictions.bias", "cls.predictions.decoder.bias"),
    },
    "roberta": {
        "dense": "lm_head.dense",
        "layer_norm": "lm_head.layer_norm",
        "bias": ("lm_head.bias", "lm_head.decoder.bias"),
    },
}
_CLASSIFIER = {"bert": ("pooler.dense", "classifier"), "roberta": ("classifier.dense", "classifier.out_proj")}
# the pooler is of pretraining, as is what follows on it; positions are counted anew; the last is a copy
UNUSED = ("pooler.", "cls.seq_relationship.", "embeddings.position_ids", "embeddings.token_type_ids")
HEAD = "classification_heads.sentence_classification_head."


def add_args(parser) -> None:
    parser.add_argument(
        "--vocab", metavar="FILE", help="the vocabulary (default: vocab.txt or vocab.json in the folder)"
    )


def convert(args) -> Tuple[Dict[str, Any], Dictionary]:
    """Return the state of a checkpoint and its dictionary.

    Args:
        args: ``format``, ``input`` (folder) and ``vocab``

    Raises:
        UsageError: when files are missing, do not fit each other, or hold what ``transkimmer`` cannot express
    """
    config, tensors = read_folder(args.input)
    kind = read_config(config)
    skims = any(".skim_predictors." in name for name in tensors)
    if args.format == "transkimmer" and not skims:
        raise UsageError(f"{args.input} has no skim predictors: convert it with --format {kind}")
    if args.format != "transkimmer" and args.format != kind:
        raise UsageError(f"{args.input} holds a {kind}: convert it with --format {kind}")
    words = read_vocabulary(args.vocab or _find_vocabulary(args.input))
    if len(words) != config["vocab_size"]:
        raise UsageError(
            f"the vocabulary has {len(words)} symbols, but the model {config['vocab_size']}: "
            "name that of the model with --vocab"
        )
    order = row_order(words, kind)
    dictionary = Dictionary()
    mask = SPECIAL[kind][4]
    for number in order[len(dictionary) :]:
        dictionary.add_symbol("<mask>" if words[number] == mask else words[number])
    if len(dictionary) != len(words):
        raise UsageError("the vocabulary has symbols twice, or some that fairseq's dictionary has already, such as <s>")
    return new_state(_flags(config, kind), convert_weights(tensors, config, order)), dictionary


def read_config(config: Dict[str, Any]) -> str:
    """Return ``bert`` or ``roberta``.

    Raises:
        UsageError: when something is missing from ``config.json`` or cannot be expressed
    """
    kind = config.get("model_type")
    if kind not in tuple(SPECIAL):  # it may be anything, a list for instance
        raise UsageError(f"config.json says model_type {kind}: only {' and '.join(SPECIAL)} can be converted")
    check_numbers(config, RANGES, {"type_vocab_size": Range(int, 0, 1024)})
    check_heads(config["hidden_size"], config["num_attention_heads"])
    if _positions(config, kind) < 1:
        raise UsageError(
            f"max_position_embeddings in config.json is {config['max_position_embeddings']}: use more "
            f"than {POSITION_OFFSET}"
        )
    if config.get("position_embedding_type", "absolute") != "absolute":
        raise UsageError(
            f"config.json says position_embedding_type {config['position_embedding_type']}, but only "
            "absolute can be converted"
        )
    if config.get("hidden_act", "gelu") not in tuple(ACTIVATIONS):
        raise UsageError(f"config.json says hidden_act {config['hidden_act']}: known are {', '.join(ACTIVATIONS)}")
    return kind


def _find_vocabulary(folder):
    for name in ("vocab.txt", "vocab.json"):
        if os.path.isfile(os.path.join(folder, name)):
            return os.path.join(folder, name)
    raise UsageError(f"there is neither vocab.txt nor vocab.json in {folder}: name the vocabulary with --vocab")


def read_vocabulary(path) -> List[str]:
    """Symbols in the order of their numbers, from a file with one a line or a JSON object of numbers.

    Raises:
        UsageError: when the file is missing or damaged
    """
    if not str(path).endswith(".json"):
        return read_lines(path)
    numbers = read_json(path)
    whole = all(isinstance(number, int) for number in numbers.values())
    if not whole or sorted(numbers.values()) != list(range(len(numbers))):
        raise UsageError(f"{path} does not number its symbols from 0 without gaps")
    return sorted(numbers, key=numbers.get)


def row_order(words: List[str], kind: str) -> List[int]:
    """The original's number of each of fairseq's.

    Raises:
        UsageError: when a special symbol is missing
    """
    for word in SPECIAL[kind]:
        if word not in words:
            raise UsageError(f"the vocabulary lacks {word}: is it that of a {kind}?")
    first = [words.index(word) for word in SPECIAL[kind][:4]]
    return first + [number for number in range(len(words)) if number not in first]


def _flags(config, kind):
    flags = ["--task", "masked_lm", "--arch", "transkimmer_base", "--cpu"]
    for name, flag in FLAGS.items():
        flags += ["--" + flag, config[name]]
    types = config.get("type_vocab_size", 0) if kind == "bert" else 0
    return flags + [
        "--activation-fn",
        ACTIVATIONS[config.get("hidden_act", "gelu")],
        "--token-types",
        types,
        "--max-positions",
        _positions(config, kind),
    ]


def _positions(config, kind):
    return config["max_position_embeddings"] - (POSITION_OFFSET if kind == "roberta" else 0)


def convert_weights(tensors: Dict[str, Tensor], config: Dict[str, Any], order: List[int]) -> Dict[str, Tensor]:
    """Return the weights of ``transkimmer``; what the file lacks of heads and predictors starts anew when it is loaded.

    Args:
        tensors: as read
        config: ``config.json``
        order: of :func:`row_order`

    Raises:
        UsageError: when a tensor is missing or of another shape
    """
    kind, dim, inner = read_config(config), config["hidden_size"], config["intermediate_size"]
    # files of the first years call the weight and bias of a LayerNorm gamma and beta
    tensors = {name.replace(".gamma", ".weight").replace(".beta", ".bias"): each for name, each in tensors.items()}
    source, target, rows = Weights(tensors, f"{kind}."), {}, torch.tensor(order)

    def take(ours, theirs, *shape):
        target[ours + ".weight"] = source.take(theirs + ".weight", *shape)
        target[ours + ".bias"] = source.take(theirs + ".bias", shape[0])

    words = source.take("embeddings.word_embeddings.weight", len(order), dim)[rows]
    target[BODY + "embed_tokens.weight"] = target["encoder.lm_head.weight"] = words
    positions = source.take("embeddings.position_embeddings.weight", config["max_position_embeddings"], dim)
    types = config.get("type_vocab_size", 0)
    segments = source.take("embeddings.token_type_embeddings.weight", types, dim) if types else torch.zeros(1, dim)
    if kind == "bert":
        positions = torch.cat((positions.new_zeros(POSITION_OFFSET, dim), positions))
        if types:
            target[BODY + "embed_segments.weight"] = segments
    else:
        positions = torch.cat((positions[:POSITION_OFFSET], positions[POSITION_OFFSET:] + segments[0]))
    target[BODY + "embed_positions.weight"] = positions
    take(BODY + "layernorm_embedding", "embeddings.LayerNorm", dim)
    shapes = {"fc1": (inner, dim), "fc2": (dim, inner), "self_attn_layer_norm": (dim,), "final_layer_norm": (dim,)}
    for number in range(config["num_hidden_layers"]):
        for ours, theirs in _LAYER.items():
            names = f"{BODY}layers.{number}.{ours}", f"encoder.layer.{number}.{theirs}"
            take(*names, *shapes.get(ours, (dim, dim)))
        if "encoder.skim_predictors.0.predictor.0.weight" in source:
            for part, shape in {"0": (dim,), "1": (dim, dim), "2": (dim,), "4": (2, dim)}.items():
                names = f"{BODY}layers.router.{number}.{part}", f"encoder.skim_predictors.{number}.predictor.{part}"
                take(*names, *shape)
    more = [name for name in source.left if name.startswith(f"encoder.layer.{config['num_hidden_layers']}.")]
    if more:
        raise UsageError(
            f"the weights hold {min(more)}, but by config.json there are only {config['num_hidden_layers']} layers"
        )
    if kind == "roberta" and _HEADS[kind]["dense"] + ".weight" in source and config.get("hidden_act", "gelu") != "gelu":
        raise UsageError(
            f"config.json says hidden_act {config['hidden_act']}, but the word head of a roberta, lm_head, has gelu: ours "
            "has one for both; convert the model without the head"
        )
    _convert_heads(source, target, take, kind, dim, rows)
    source.require_used(UNUSED)
    return target


def _convert_heads(source, target, take, kind, dim, rows):
    names = _HEADS[kind]
    if names["dense"] + ".weight" in source:
        take("encoder.lm_head.dense", names["dense"], dim, dim)
        take("encoder.lm_head.layer_norm", names["layer_norm"], dim)
        target["encoder.lm_head.bias"] = source.take(names["bias"], len(rows))[rows]
    dense, out = _CLASSIFIER[kind]
    if out + ".weight" in source and dense + ".weight" in source:
        take(HEAD + "dense", dense, dim, dim)
        take(HEAD + "out_proj", out, source.tensors[out + ".weight"].size(0), dim)
    if "qa_outputs.weight" in source:
        take("span_head", "qa_outputs", 2, dim)


def outputs(args, folder) -> Iterator[Tuple[str, Tensor, Tensor]]:
    """Compare the converted model with the definition of the original on a short text: its states, skim predictors and each
    head that the original has. Where the original has no skim predictors, skimming is off.

    Args:
        args: of :func:`convert`
        folder: with ``checkpoint.pt`` and ``dict.txt``

    Yields:
        what computes, what it found, and what the original computes
    """
    config, tensors = read_folder(args.input)
    kind, words = config["model_type"], read_vocabulary(args.vocab or _find_vocabulary(args.input))
    flags = {"no_skimming": not any(".skim_predictors." in name for name in tensors), "load_checkpoint_heads": True}
    path = os.path.join(folder, "checkpoint.pt")
    model, task = load_model(path, {"data": folder, **flags})
    model.eval()
    start, _, end, *always = (words.index(word) for word in SPECIAL[kind])
    named = dict(zip(SPECIAL[kind], ("<s>", "<pad>", "</s>", "<unk>", "<mask>")))
    ours = torch.tensor([task.source_dictionary.index(named.get(word, word)) for word in words])
    others = [number for number, word in enumerate(words) if word not in named]
    second = min(1, max(0, config.get("type_vocab_size", 0) - 1)) if kind == "bert" else 0

    def compute(text):
        return definition.encode(tensors, config, text, [second * (end in text[:place]) for place in range(len(text))])

    draw = partial(
        draw_text, start=start, end=end, always=always, others=others, longest=min(12, _positions(config, kind))
    )
    text, original = clear_cut(draw, compute)
    expected, ids = definition.heads(tensors, config, original.states), ours[text].unsqueeze(0)
    yield "the converted model", model(ids, features_only=True)[0][0], original.states
    if original.skims:
        router = model.encoder.sentence_encoder.layers.router
        scores = torch.stack([predictor(states.float()) for predictor, (states, _) in zip(router, original.skims)])
        yield "the skim predictors of the converted model", scores, torch.stack([each for _, each in original.skims])
    if "words" in expected:
        yield "the word head of the converted model", model(ids)[0][0][:, ours], expected["words"]
    if "labels" in expected:
        scores = model(ids, classification_head_name="sentence_classification_head")[0][0]
        yield "the sentence classifier of the converted model", scores, expected["labels"]
    if "spans" in expected:
        model.register_span_head()  # which fairseq leaves to the task
        weights = load_checkpoint(path)["model"]
        model.span_head.load_state_dict({name: weights[f"span_head.{name}"] for name in ("weight", "bias")})
        yield "the span classifier of the converted model", model(ids, spans=True)[0][0].t(), expected["spans"]

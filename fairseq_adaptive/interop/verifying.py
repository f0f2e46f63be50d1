"""What a converter made, read strictly and compared with what it was made of, before it is said to be written."""

import argparse
import re
from typing import Any, Callable, Dict, List, Mapping, Sequence, Tuple

import torch
from fairseq import models
from fairseq.data import Dictionary
from torch import Tensor

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.interop.checkpoint import load_checkpoint, model_options

TOLERANCE = 1e-3  # of scores in float32; what is wrong differs by far more
# of a converted model in float32 beside a definition in float64. Of all-MiniLM-L6-v2 rounding is 3e-7, the other form of
# GELU 5e-4, and an epsilon of 1e-5 for 1e-12 in LayerNorms 2e-4 of the largest output
DEFINED = 1e-4
LENGTHS = (7, 5, 2)
MARGIN = 1e-4  # rounding to float32 moves nothing over a threshold that is farther away
TRIES = 10


class _Task:
    """What a model asks of its task when it is built."""

    def __init__(self, source: Dictionary, target: Dictionary):
        self.source_dictionary, self.target_dictionary, self.dictionary = source, target, target


def numbered_dictionary(size: int) -> Dictionary:
    """A dictionary whose words have no names."""
    dictionary = Dictionary()
    for number in range(len(dictionary), size):
        dictionary.add_symbol(f"piece{number}")
    return dictionary


def vocabulary_size(weights: Mapping[str, Tensor], side: str) -> int:
    """How many entries the embedding of a side has, ``encoder`` or ``decoder``; 0: it has none.

    Args:
        weights: of a Transformer, plain or with an adaptive input
    """
    table = re.compile(rf"{side}\.(?:sentence_encoder\.)?embed_tokens\.(weight|embeddings\.\d+\.0\.weight|tables\.\d+)")
    return sum(tensor.size(0) for name, tensor in weights.items() if table.fullmatch(name))


def built(state: Dict[str, Any]):
    """The model in a checkpoint, without its task: its weights are read strictly, its words are numbers.

    Raises:
        UsageError: when the weights are not those of the model that its flags describe
    """
    options, weights = model_options(state), state["model"]
    sizes = [vocabulary_size(weights, side) for side in ("encoder", "decoder")]
    if not any(sizes):
        raise UsageError("the embeddings of the model are of a kind that cannot be exported")
    target = numbered_dictionary(sizes[1] or sizes[0])
    source = target if sizes[0] in (0, sizes[1]) else numbered_dictionary(sizes[0])
    options.update(encoder_embed_path=None, decoder_embed_path=None)  # where embeddings once came from
    options["load_checkpoint_heads"] = True  # of classifiers
    if not sizes[0]:  # a language model reads the longest sample of its task
        options.setdefault("tokens_per_sample", 512)
        options["max_target_positions"] = options.get("max_target_positions") or options["tokens_per_sample"]
    model = models.build_model(argparse.Namespace(**options), _Task(source, target))
    try:
        model.load_state_dict(dict(weights), strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise UsageError(
            f"the weights are not those of {options['_name']}, and cannot be exported: {reason}"
        ) from error
    return model.float().eval()


def sequences(model) -> Tuple[Tensor, ...]:
    """What :func:`scores` reads of a model: sources [B, T] padded on the left, where there are encoder and decoder, and words
    [B, T] padded on the right, of the lengths ``LENGTHS``; always the same random words."""
    generator = torch.Generator().manual_seed(1)

    def rows(dictionary, left):
        found = torch.full((len(LENGTHS), max(LENGTHS)), dictionary.pad())
        for row, length in zip(found, LENGTHS):
            words = torch.randint(dictionary.nspecial, len(dictionary), (length,), generator=generator)
            words[-1 if left else 0] = dictionary.eos()
            row[slice(-length, None) if left else slice(length)] = words
        return found

    encoder, decoder = (getattr(model, side, None) for side in ("encoder", "decoder"))
    if decoder is None:
        return (rows(encoder.dictionary, left=False),)
    sources = () if encoder is None else (rows(encoder.dictionary, left=True),)
    return *sources, rows(decoder.dictionary, left=False)


@torch.no_grad()
def scores(model, inputs: Tuple[Tensor, ...]) -> Tensor:
    """Log-probabilities [P, V] that a fairseq Transformer or RoBERTa gives at the P words of :func:`sequences`."""
    *sources, previous = inputs
    lengths = torch.tensor(LENGTHS)
    out = model(*sources, lengths, previous) if sources else model(previous)
    return model.get_normalized_probs(out, log_probs=True)[torch.arange(max(LENGTHS)) < lengths.unsqueeze(1)]


def draw_text(
    generator: torch.Generator, start: int, end: int, always: Sequence[int], others: Sequence[int], longest: int
) -> List[int]:
    """A text of two parts for BERT and its like: ``start``, five words, ``end``, four words, ``end``.

    Args:
        generator: of random numbers
        start, end: numbers of ``[CLS]`` and ``[SEP]``
        always: at most nine words, which come first
        others: of which the rest are drawn
        longest: after so many tokens it is cut off
    """
    drawn = torch.randint(len(others), (9 - len(always),), generator=generator).tolist() if others else []
    words = [*always, *(others[number] for number in drawn)]
    return [start, *words[:5], end, *words[5:], end][:longest]


def clear_cut(draw: Callable, compute: Callable) -> Tuple[List[int], Any]:
    """Return a text, and what is computed of it, that rounding does not decide; after ``TRIES`` texts, the last one.

    Args:
        draw: a random generator to a text
        compute: a text to a tuple whose ``margin`` says how close to a threshold the closest decision was
    """
    generator = torch.Generator().manual_seed(1)
    for _ in range(TRIES):
        text = draw(generator)
        found = compute(text)
        if found.margin > MARGIN:
            break
    return text, found


def require_same(found: Tensor, expected: Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    """
    Args:
        found, expected: scores, or other outputs
        what: what computes the former, for the message
        tolerance: the largest difference, as a share of the largest output where that is above 1

    Raises:
        UsageError: when they differ by more than rounding
    """
    difference = float((found - expected).abs().max()) if found.shape == expected.shape else float("inf")
    if not difference <= tolerance * max(1.0, float(expected.abs().max())):
        raise UsageError(f"{what} computes something else, its outputs differ by {difference:.3g}: nothing was written")


def require_same_model(state: Dict[str, Any], original: Dict[str, Any], what: str) -> None:
    """Build the models of two checkpoints and compare their scores.

    Raises:
        UsageError: when one cannot be built, or they differ
    """
    made, model = built(state), built(original)
    inputs = sequences(model)
    require_same(scores(made, inputs), scores(model, inputs), what)


def require_readable(path, state: Dict[str, Any]) -> None:
    """
    Raises:
        UsageError: when a file that was written holds other weights than it should
    """
    weights, read = state["model"], load_checkpoint(path)["model"]
    if weights.keys() != read.keys() or not all(torch.equal(weights[name].cpu(), read[name]) for name in read):
        raise UsageError(f"{path} was read back and holds other weights than were written")

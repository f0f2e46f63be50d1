"""Perplexity of a language model per token, word and character, so that models of different vocabularies compare."""

import math
import time
from argparse import Namespace
from dataclasses import dataclass
from typing import Any, Dict, Optional

import torch
from fairseq import checkpoint_utils, tasks, utils
from fairseq.sequence_scorer import SequenceScorer

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.interop.checkpoint import load_checkpoint, model_options
from fairseq_adaptive.modules.layers.prepacked_linear import constant_weights
from fairseq_adaptive.progress import progress
from fairseq_adaptive.tasks.segmented_language_modeling import takes_memory


@dataclass
class Scored:
    """What a model said of a text: ``nll`` is the sum over all tokens, in nats."""

    nll: float
    tokens: int
    unknown: int
    lines: int
    seconds: float


def _load(checkpoint, data, tokens_per_sample, context_window, overrides):
    state = load_checkpoint(checkpoint)
    options = model_options(state)
    for name in overrides:
        if name not in options:
            raise UsageError(f"the model in {checkpoint} ({options['_name']}) has no --{name.replace('_', '-')}")
    length = state["cfg"]["task"].get("tokens_per_sample") if tokens_per_sample is None else tokens_per_sample
    if not length:
        raise UsageError(f"{checkpoint} does not say how long segments are: name --tokens-per-sample")
    if not 0 <= context_window < length:
        raise UsageError(
            f"--context-window is at least 0 and less than --tokens-per-sample ({length}), not {context_window}"
        )
    name = "language_modeling" if context_window else "segmented_language_modeling"
    task = tasks.setup_task(
        Namespace(
            task=name,
            data=str(data),
            tokens_per_sample=length - context_window,
            dataset_impl=None,
            seed=1,
            use_plasma_view=False,
            plasma_path=None,
            tpu=False,
        )
    )
    (model,), _, task = checkpoint_utils.load_model_ensemble_and_task(
        [str(checkpoint)], arg_overrides=overrides, task=task
    )
    if context_window and takes_memory(model):
        raise UsageError("--context-window is for models without a memory; this one has --memory-length")
    if context_window and length > model.max_positions():
        raise UsageError(
            f"segments of {length} tokens, with --context-window, are longer than the "
            f"{model.max_positions()} positions that the model reads: use --tokens-per-sample "
            f"{model.max_positions()} or less"
        )
    return model, task


@constant_weights()
def score_text(
    checkpoint,
    data,
    split="test",
    batch_size=1,
    tokens_per_sample: Optional[int] = None,
    context_window=0,
    overrides: Optional[Dict[str, Any]] = None,
    device="cpu",
) -> Scored:
    """Score every token of a binarised text, as ``fairseq-eval-lm`` does.

    Args:
        checkpoint: of a language model
        data: folder of ``fairseq-preprocess --only-source`` with the model's dictionary
        batch_size: number of streams that the text is read in; each but the first begins without memory
        tokens_per_sample: length of a segment; that of the training by default
        context_window: for models without memory, tokens of a segment that are only read (fairseq's LM context window)
        overrides: options of the model in place of those of the training

    Raises:
        UsageError: no such option, or segments and streams that do not fit the text or the model
    """
    model, task = _load(checkpoint, data, tokens_per_sample, context_window, overrides or {})
    task.load_dataset(split)
    batches = task.eval_lm_dataloader(
        task.dataset(split), max_tokens=None, batch_size=batch_size, num_workers=0, context_window=context_window
    )
    scorer, dictionary = SequenceScorer(task.target_dictionary), task.target_dictionary
    model = model.to(device).eval()
    scored, start = Scored(0.0, 0, 0, 0, 0.0), time.perf_counter()
    for sample in progress(batches, "segments"):
        for (hypothesis,) in scorer.generate([model], utils.move_to_cuda(sample, device)):
            scored.nll -= hypothesis["positional_scores"].sum(dtype=torch.float64).item()
            scored.tokens += hypothesis["tokens"].numel()
            scored.unknown += int(hypothesis["tokens"].eq(dictionary.unk()).sum())
            scored.lines += int(hypothesis["tokens"].eq(dictionary.eos()).sum())
    scored.seconds = time.perf_counter() - start
    if not scored.tokens:
        raise UsageError(f"{split} in {data} has no tokens")
    if not math.isfinite(scored.nll):
        raise UsageError(f"the loss of {split} is {scored.nll}: the model in {checkpoint} overflows on this text")
    return scored


def count_text(path) -> Dict[str, int]:
    """Lines, words between whitespace, characters and bytes of a text; line ends are characters.

    Raises:
        UsageError: when it is missing or not UTF-8
    """
    counts = {"lines": 0, "words": 0, "characters": 0, "bytes": 0}
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                counts["lines"] += 1
                counts["words"] += len(line.split())
                counts["characters"] += len(line)
                counts["bytes"] += len(line.encode())
    except FileNotFoundError:
        raise UsageError(f"the text {path} is missing") from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text ({error.reason})") from None
    return counts


def count_bytes(path) -> Dict[str, int]:
    """Lines and bytes of a file of bytes (enwik8), for models whose tokens are bytes.

    Raises:
        UsageError: when it is missing
    """
    try:
        with open(path, "rb") as file:
            text = file.read()
    except FileNotFoundError:
        raise UsageError(f"the text {path} is missing") from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    return {"lines": text.count(b"\n") + (not text.endswith(b"\n")), "bytes": len(text)}


def perplexities(scored: Scored, counts: Optional[Dict[str, int]] = None) -> Dict[str, Dict[str, float]]:
    """The same loss over each unit of the text: how many there are, perplexity and bits.

    ``word or line end`` has one more unit a line than ``word``: that is how perplexities of word-level models on
    WikiText and the One Billion Word corpus are published, where the end of a line is predicted, too. ``word`` shares
    the same loss, that of line ends included, among the words alone.

    Args:
        scored: what :func:`score_text` returned
        counts: what :func:`count_text` or :func:`count_bytes` returned for the text before it was split into tokens

    Raises:
        UsageError: when the numbers of lines differ: it is not the text that was scored
    """
    units = {"token": scored.tokens}
    if counts is not None:
        if counts["lines"] != scored.lines:
            raise UsageError(
                f"the raw text has {counts['lines']:,} lines, the binarised one {scored.lines:,}: "
                "they must be the same text"
            )
        if "words" in counts:
            units["word or line end"] = counts["words"] + counts["lines"]
            units["word"] = counts["words"]
            units["character"] = counts["characters"]
        units["byte"] = counts["bytes"]
    table = {}
    for unit, number in units.items():
        bits = scored.nll / number / math.log(2) if number else math.nan
        table[unit] = {"count": number, "perplexity": 2**bits if bits < 1000 else math.inf, "bits": bits}
    return table

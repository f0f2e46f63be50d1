"""fairseq's plain Transformer as a CTranslate2 model."""

import argparse
import os
from typing import Any, Dict, Optional

import torch
from fairseq.data import Dictionary
from fairseq.data.data_utils import infer_language_pair
from fairseq.models import ARCH_MODEL_NAME_REGISTRY

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.files import require_new, whole_folder
from fairseq_adaptive.interop.checkpoint import given_options, save_tensors
from fairseq_adaptive.interop.verifying import LENGTHS, built, require_same, scores, sequences

# CTranslate2's converter checks some flags itself; of these it would lose weights, or die without saying why
_UNKNOWN_TO_CTRANSLATE2 = (
    "adaptive_softmax_cutoff",
    "no_cross_attention",
    "cross_self_attention",
    "scale_attn",
    "scale_fc",
    "scale_heads",
    "scale_resids",
)


def convert_to_ctranslate2(
    state: Dict[str, Any], data_dir, output, source_lang: Optional[str] = None, target_lang: Optional[str] = None
):
    """Write a CTranslate2 model; layers that are equal are stored once. It is loaded and its scores are compared with
    those of the checkpoint before the folder has its name.

    Args:
        state: from :func:`~fairseq_adaptive.interop.unroll_checkpoint`
        data_dir: folder with the dictionaries, as ``fairseq-preprocess`` writes it
        output: the folder to write
        source_lang, target_lang: names of the dictionaries, where neither the checkpoint nor the data tell

    Raises:
        UsageError: when CTranslate2 is not installed or cannot express the model, what it made computes something else,
            or ``output`` exists
    """
    require_new(output)
    try:
        from ctranslate2.converters import FairseqConverter
    except ImportError:
        raise UsageError(
            "CTranslate2 is not installed: pip install 'fairseq_adaptive[export]' (or pip install ctranslate2)"
        ) from None
    if not os.path.isdir(data_dir):
        raise UsageError(f"there is no folder {data_dir} with the dictionaries of the model")
    options = _namespace(state)
    options.source_lang, options.target_lang = _languages(options, os.fspath(data_dir), source_lang, target_lang)
    _refuse_unknown(options)
    with whole_folder(output) as made:
        plain = os.path.join(os.path.dirname(made), "plain.pt")  # goes away with what is around the new folder
        save_tensors({"args": None, "cfg": {"model": options}, "model": state["model"]}, plain)
        converter = FairseqConverter(plain, os.fspath(data_dir))
        try:
            converter.convert(made, force=True)
        except ValueError as error:  # how the converter says no
            raise UsageError(f"CTranslate2 cannot convert the model: {' '.join(str(error).split())}") from error
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise
            raise UsageError(
                f"the model does not fit the dictionaries in {data_dir}: {' '.join(str(error).split())}"
            ) from error
        _require_same_scores(state, made, os.fspath(data_dir), options)


def _require_same_scores(state, made, data_dir, options):
    import ctranslate2

    model = built(state)
    names = ("", "") if options.source_lang is None else (f".{options.source_lang}", f".{options.target_lang}")
    source, target = (Dictionary.load(os.path.join(data_dir, f"dict{name}.txt")) for name in names)
    inputs = sequences(model)
    expected = scores(model, inputs)
    previous = [target.string(row[1:length]).split() for row, length in zip(inputs[-1], LENGTHS)]
    if len(inputs) > 1:
        texts = [source.string(row[-length:]).split() for row, length in zip(inputs[0], LENGTHS)]
        found = ctranslate2.Translator(made, device="cpu", intra_threads=1).score_batch(texts, previous)
        wanted = [[*row[1:length].tolist(), target.eos()] for row, length in zip(inputs[-1], LENGTHS)]
    else:
        texts = [[target.eos_word, *words] for words in previous]
        found = ctranslate2.Generator(made, device="cpu", intra_threads=1).score_batch(texts)
        wanted = [row[1:length].tolist() for row, length in zip(inputs[-1], LENGTHS)]
    rows = expected.split(LENGTHS)
    taken = torch.cat([row[: len(ids)].gather(1, torch.tensor(ids).unsqueeze(1)) for row, ids in zip(rows, wanted)])
    given = torch.tensor([score for each in found for score in each.log_probs])
    require_same(given, taken.squeeze(1), "the CTranslate2 model")


def _namespace(state):
    """What the converter wants: the flags of the task and the model in one namespace."""
    task, model = state["cfg"]["task"], given_options(state)
    return argparse.Namespace(**{**task, **model, "task": task["_name"], "arch": model["_name"]})


def _languages(options, data_dir, source, target):
    """None, None for language models."""
    if "source_lang" not in options:
        return None, None
    inferred = infer_language_pair(data_dir)
    source = source or options.source_lang or inferred[0]
    target = target or options.target_lang or inferred[1]
    if not source or not target:
        raise UsageError(f"{data_dir} does not tell the languages of the model: add --source-lang and --target-lang")
    return source, target


def _refuse_unknown(options):
    found = [name for name in _UNKNOWN_TO_CTRANSLATE2 if getattr(options, name, None)]
    translation = ARCH_MODEL_NAME_REGISTRY[options.arch] == "transformer"
    if translation and getattr(options, "no_decoder_final_norm", False) and options.decoder_normalize_before:
        found.append("no_decoder_final_norm")
    width = options.decoder_embed_dim if translation else options.decoder_input_dim
    found += [name for name in ("decoder_input_dim", "decoder_output_dim") if getattr(options, name, width) != width]
    if found:
        flags = ", ".join("--" + name.replace("_", "-") for name in found)
        raise UsageError(f"CTranslate2 has no equivalent of {flags}, with which the model was trained")

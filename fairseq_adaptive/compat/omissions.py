"""Patches of fairseq's evaluations: a figure is that of all samples, unless leaving some out was asked for."""

import argparse
import logging
import os
import sys
import zipfile

import numpy as np
import torch

from fairseq_adaptive.compat.evaluation import running
from fairseq_adaptive.errors import UsageError

logger = logging.getLogger(__name__)

SKIP = "--skip-invalid-size-inputs-valid-test"
_skip_asked = SKIP in sys.argv  # also in the processes that fairseq starts for several GPUs, which parse no flags


def _longest(dataset, indices):
    """Largest size among samples: a number, or one of each side."""
    sizes = [dataset.size(int(index)) for index in indices]
    if isinstance(sizes[0], dict):
        return {key: max(size[key] for size in sizes) for key in sizes[0]}
    longest = np.max(np.asarray(sizes), axis=0)
    return longest.item() if longest.ndim == 0 else tuple(longest.tolist())


def _too_long(dataset, ignored, total, max_positions):
    return (
        f"{len(ignored):,} of {total:,} samples are longer than {max_positions} tokens, which model and task read; "
        f"the longest have {_longest(dataset, ignored)}"
    )


def refuse_omissions():
    """Samples that are too long are refused, with how many and how long, unless skipping them was asked for.

    ``fairseq-eval-lm`` leaves them out unasked and prints the perplexity of the others, "Perplexity: 1.00" where there
    are none. Other evaluations stop with the first one, and do not say how many there are. Where all are too long,
    nothing is left to compute a figure of, or to train on.
    """
    from fairseq.tasks import FairseqTask
    from fairseq.tasks.language_modeling import LanguageModelingTask
    from fairseq.tasks.multilingual_language_modeling import MultilingualLanguageModelingTask
    from fairseq.tasks.speech_dlm_task import SpeechDLMTask

    stock_filter = FairseqTask.filter_indices_by_size

    def filter_indices_by_size(self, indices, dataset, max_positions=None, ignore_invalid_inputs=False):
        kept, ignored = dataset.filter_indices_by_size(indices, max_positions)
        if len(ignored) and not ignore_invalid_inputs:
            raise UsageError(
                f"{_too_long(dataset, ignored, len(indices), max_positions)}: raise what limits them "
                "(--tokens-per-sample, --max-source-positions, --max-target-positions, --max-positions) "
                f"where the model can read more, shorten them, or skip this example with {SKIP}, and all others"
            )
        if len(ignored) and not len(kept):
            raise UsageError(f"{_too_long(dataset, ignored, len(indices), max_positions)}: no sample is left")
        return stock_filter(self, indices, dataset, max_positions, ignore_invalid_inputs)

    def refusing(stock):
        def eval_lm_dataloader(
            self,
            dataset,
            max_tokens=36000,
            batch_size=None,
            max_positions=None,
            num_shards=1,
            shard_id=0,
            *args,
            **kwargs,
        ):
            if max_positions is not None and not _skip_asked:
                ignored = dataset.filter_indices_by_size(dataset.ordered_indices(), max_positions)[1]
                if len(ignored):
                    raise UsageError(
                        f"{_too_long(dataset, ignored, len(dataset), max_positions)}: cut the text into "
                        "shorter ones with --tokens-per-sample (that of the training is the default), "
                        f"or leave them out with {SKIP}"
                    )
            if num_shards > 1:
                logger.warning(
                    f"shard {shard_id} of {num_shards}: the perplexity below is that of its samples alone; "
                    "fairseq-validate gives that of all workers"
                )
            return stock(self, dataset, max_tokens, batch_size, max_positions, num_shards, shard_id, *args, **kwargs)

        return eval_lm_dataloader

    FairseqTask.filter_indices_by_size = filter_indices_by_size
    for task in LanguageModelingTask, MultilingualLanguageModelingTask, SpeechDLMTask:
        task.eval_lm_dataloader = refusing(task.eval_lm_dataloader)


def _trained_length(path):
    """``--tokens-per-sample`` of the training that wrote a checkpoint; None where it cannot be known."""
    if not path or not os.path.isfile(path):
        return None
    try:
        # the weights are not read
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        task = state["cfg"]["task"] if state.get("cfg") else vars(state["args"])
        return task.get("tokens_per_sample")
    except Exception:  # whoever loads the model says what is wrong with it
        return None


def take_trained_length():
    """``fairseq-eval-lm`` reads pieces as long as those of the training, where no ``--tokens-per-sample`` is given.

    It cuts the text into pieces of 1,024 tokens, whatever the model was trained with, and the model reads none of them.
    """
    from fairseq import options

    stock = options.parse_args_and_arch

    def parse_args_and_arch(parser, input_args=None, *args, **kwargs):
        global _skip_asked
        parsed = stock(parser, input_args, *args, **kwargs)
        flags = parsed[0] if isinstance(parsed, tuple) else parsed
        if not hasattr(flags, "output_word_probs"):  # of another command
            return parsed
        _skip_asked = flags.skip_invalid_size_inputs_valid_test
        given = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        given.add_argument("--tokens-per-sample")
        if hasattr(flags, "tokens_per_sample") and given.parse_known_args(input_args)[0].tokens_per_sample is None:
            length = _trained_length(flags.path)
            if length and length != flags.tokens_per_sample:
                logger.info(f"--tokens-per-sample {length}, as in the training of {flags.path}")
                flags.tokens_per_sample = length
        return parsed

    options.parse_args_and_arch = parse_args_and_arch


def refuse_empty_perplexity():
    """``fairseq-eval-lm`` prints no perplexity that leaves tokens out, nor one of no token.

    It takes tokens of probability 0 out of the sum, and says 1 for no token, as in an empty shard.
    """

    def refusing(stock, module):
        def eval_lm(models, source_dictionary, batch_iterator, *args, **kwargs):
            tokens, scorer = 0, module.SequenceScorer

            class Scorer(scorer):
                def generate(self, models, sample, **kwargs):
                    nonlocal tokens
                    found = super().generate(models, sample, **kwargs)
                    scores = torch.cat([best["positional_scores"] for best, *_ in found])
                    if scores.isinf().any():
                        raise UsageError(
                            f"{int(scores.isinf().sum()):,} of {len(scores):,} tokens of a batch have "
                            "probability 0: the perplexity is infinite. Evaluate without --fp16, or with "
                            "a dictionary whose words the model has seen"
                        )
                    tokens += len(scores)
                    return found

            module.SequenceScorer = Scorer
            try:
                result = stock(models, source_dictionary, batch_iterator, *args, **kwargs)
            finally:
                module.SequenceScorer = scorer
            if not tokens:
                raise UsageError(
                    "there is no token to compute a perplexity of: take a split with text, and no more "
                    "shards or workers than batches"
                )
            return result

        return eval_lm

    for module in running("eval_lm"):
        module.eval_lm = refusing(module.eval_lm, module)

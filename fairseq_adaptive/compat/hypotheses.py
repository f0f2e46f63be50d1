"""Patches of how fairseq finds hypotheses and what it prints of them."""

import copy

import torch

from fairseq_adaptive.errors import UsageError


def tell_sentences_apart():
    """``--diverse-beam-groups`` compares the groups of a sentence with each other.

    fairseq keeps what the groups share by row of the batch, and looks it up by number in the data set: an IndexError,
    or where numbers are small, the penalties of another sentence.
    """
    from fairseq.search import DiverseBeamSearch

    stock = DiverseBeamSearch.step

    def step(self, step, lprobs, scores, prev_output_tokens=None, original_batch_idxs=None):
        if step == 0:
            self.first_batch_idxs = original_batch_idxs
        if original_batch_idxs is not None:
            original_batch_idxs = (original_batch_idxs[:, None] == self.first_batch_idxs).int().argmax(1)
        return stock(self, step, lprobs, scores, prev_output_tokens, original_batch_idxs)

    DiverseBeamSearch.step = step


def refuse_missing_history():
    """``--print-step`` and ``--retain-iter-history`` of hypotheses that have no steps are refused.

    Those of iterative decoding (``--task translation_lev``) have; others end with a KeyError.
    """
    from fairseq.tasks import FairseqTask

    stock = FairseqTask.build_generator

    def build_generator(self, models, args, *rest, **kwargs):
        for flag in "print_step", "retain_iter_history":
            if getattr(args, flag, False):
                raise UsageError(
                    f"--{flag.replace('_', '-')} is for iterative decoding (--task translation_lev): "
                    "hypotheses of a beam search have no steps"
                )
        return stock(self, models, args, *rest, **kwargs)

    FairseqTask.build_generator = build_generator


def refuse_missing_constraints():
    """``--constraints`` without any is refused: ``fairseq-generate`` has none to read, ``fairseq-interactive`` has."""
    from fairseq.search import LexicallyConstrainedBeamSearch

    stock = LexicallyConstrainedBeamSearch.init_constraints

    def init_constraints(self, batch_constraints, beam_size):
        if batch_constraints is None:
            raise UsageError("--constraints is for fairseq-interactive, which reads them behind sentences, after tabs")
        return stock(self, batch_constraints, beam_size)

    LexicallyConstrainedBeamSearch.init_constraints = init_constraints


def align_unknown_words():
    """``--replace-unk`` puts the source word that was attended to most in place of ``<unk>``.

    fairseq expects the source's place of each word, as an earlier version gave it. The generator gives alignments only
    when they are to be printed, and then as pairs or as probabilities. Without a file, fairseq opens one named "@@ ".
    """
    from fairseq import utils
    from fairseq.tasks import FairseqTask

    stock, stock_dictionary = FairseqTask.build_generator, utils.load_align_dict

    def load_align_dict(path):
        try:
            return stock_dictionary("" if path == "@@ " else path)
        except IndexError:
            raise UsageError(f"--replace-unk {path}: a line has no two words, one of the source and its translation")

    def build_generator(self, models, args, *rest, **kwargs):
        if getattr(args, "replace_unk", None) is not None and not getattr(args, "print_alignment", None):
            args = copy.deepcopy(args)  # what is printed stays as it was asked for
            args.print_alignment = "hard"
        return stock(self, models, args, *rest, **kwargs)

    def replace_unk(hypo_str, src_str, alignment, align_dict, unk):
        source, hypothesis, places = src_str.split(), hypo_str.split(), {}
        if isinstance(alignment, torch.Tensor):  # empty: the generator gives none
            alignment = []
        for number, aligned in enumerate(alignment):
            if isinstance(aligned, tuple):
                places.setdefault(aligned[1], aligned[0])
            else:
                words = aligned[: len(source)]  # without </s>
                places[number] = max(range(len(words)), key=lambda place: float(words[place]))
        for number, word in enumerate(hypothesis):
            if word == unk and places.get(number, len(source)) < len(source):
                found = source[places[number]]
                hypothesis[number] = align_dict.get(found, found)
        return " ".join(hypothesis)

    FairseqTask.build_generator = build_generator
    utils.load_align_dict, utils.replace_unk = load_align_dict, replace_unk

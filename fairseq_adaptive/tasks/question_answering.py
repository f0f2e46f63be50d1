"""Extractive question answering in the format of SQuAD: ``--task question_answering``."""

import functools
import logging
import math
import os
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Dict, List, Optional

import torch
from fairseq.data import Dictionary
from fairseq.dataclass import FairseqDataclass
from fairseq.logging import metrics
from fairseq.tasks import FairseqTask, register_task
from omegaconf import II, MISSING

from fairseq_adaptive.data import squad_answers
from fairseq_adaptive.data.span_dataset import SpanDataset
from fairseq_adaptive.data.squad import Question, Window, cut, load_tokenizer, read_squad, windows_of
from fairseq_adaptive.data.squad_answers import Candidate, candidates, concluded
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules.watched import Watched
from fairseq_adaptive.ranges import NUMBER, POSITIONS, Range, check_ranges, ranged

logger = logging.getLogger(__name__)


@dataclass
class QuestionAnsweringConfig(FairseqDataclass):
    data: str = field(
        default=MISSING,
        metadata={"help": "folder with dict.txt of the model, train.json and valid.json in the format of SQuAD"},
    )
    tokenizer: Optional[str] = field(
        default=None,
        metadata={"help": "folder with vocab.txt, or vocab.json and merges.txt, of the model (default: the data's)"},
    )
    cased: bool = field(default=False, metadata={"help": "vocab.txt distinguishes upper and lower case"})
    max_positions: int = ranged(384, POSITIONS, "longest window of a question and its context")
    doc_stride: int = ranged(128, POSITIONS, "from the beginning of a window to that of the next")
    max_query_length: int = ranged(64, POSITIONS, "longest question; what is beyond is cut off")
    max_answer_length: int = ranged(30, POSITIONS, "longest answer, in tokens")
    n_best_size: int = ranged(20, Range(int, 1, 10000), "how many answers to keep of a question")
    null_threshold: float = ranged(
        0.0, NUMBER, "version 2: a question has no answer where that scores by more than this above the best one"
    )
    seed: int = II("common.seed")


@register_task("question_answering", dataclass=QuestionAnsweringConfig)
class QuestionAnsweringTask(FairseqTask):
    """Reads SQuAD's JSON, cuts it into windows, and puts the windows' scores together to answers.

    In validation ``em`` and ``f1`` are those of the official evaluation over all questions, at any number of workers.

    Args:
        cfg: :class:`QuestionAnsweringConfig`
        dictionary: of the model

    Raises:
        UsageError: for impossible flags, or when files are missing
    """

    def __init__(self, cfg, dictionary):
        super().__init__(cfg)
        check_ranges(cfg, type(self))
        self.dictionary = dictionary
        self._tokenizer, self._double = load_tokenizer(cfg.tokenizer or cfg.data, cfg.cased)
        self._questions: Dict[str, list] = {}
        self._offsets: Dict[str, list] = {}
        self._version_2: Dict[str, bool] = {}
        self._validating: Optional[str] = None
        self._windows = defaultdict(float)  # how many were validated, by all workers
        self._figures: Dict[str, dict] = {}
        self._found = defaultdict(dict)  # by split and question: candidates, and the lowest score of "no answer"

    @classmethod
    def setup_task(cls, cfg, **kwargs):
        path = os.path.join(cfg.data, "dict.txt")
        if not os.path.isfile(path):
            raise UsageError(f"there is no {path}: copy the dictionary of the model to --data")
        dictionary = Dictionary.load(path)
        dictionary.add_symbol("<mask>")
        return cls(cfg, dictionary)

    def load_dataset(self, split, combine=False, **kwargs):
        self.load_file(split, os.path.join(self.cfg.data, f"{split}.json"))

    def load_file(self, split: str, path) -> SpanDataset:
        """Read one file as a split.

        Raises:
            UsageError: as :func:`~fairseq_adaptive.data.squad.read_squad`
        """
        questions, version_2 = read_squad(path)
        contexts, windows, offsets, unknown, pieces = {}, [], [], 0, 0
        for number, question in enumerate(questions):
            if question.context not in contexts:
                contexts[question.context] = new, _ = self.cut(question.context)
                unknown += sum(self.dictionary.index(each) == self.dictionary.unk() for each in new)
                pieces += len(new)
            context = contexts[question.context]
            windows += self.windows(number, question, context)
            offsets.append(context[1])
        if unknown > 0.5 * pieces:
            raise UsageError(f"dict.txt lacks {unknown} of {pieces} pieces of {path}: it is not that of --tokenizer")
        if split.startswith("train") and not any(question.answers for question in questions):
            raise UsageError(f"{path} has no answers to learn from")
        self._questions[split], self._offsets[split], self._version_2[split] = questions, offsets, version_2
        logger.info("%s: %d questions, %d windows, version %d", path, len(questions), len(windows), 1 + version_2)
        self.datasets[split] = SpanDataset(windows, self.dictionary.pad(), self.cfg.seed, split)
        return self.datasets[split]

    def cut(self, text: str):
        """Pieces of a text, and of each where it begins and ends there."""
        return cut(self._tokenizer, text)

    def windows(self, number: int, question: Question, context) -> List[Window]:
        """The windows of a question, the ``number``-th; ``context`` is what :meth:`cut` gives of its context."""
        cfg = self.cfg
        return windows_of(
            number,
            question,
            self.cut(question.text)[0],
            context,
            self.dictionary,
            cfg.max_positions,
            cfg.doc_stride,
            cfg.max_query_length,
            self._double,
        )

    def build_model(self, cfg, from_checkpoint=False):
        model = super().build_model(cfg, from_checkpoint)
        if not hasattr(model, "register_span_head"):
            raise UsageError("--task question_answering needs a model with a span head: --arch transkimmer_base")
        model.register_span_head()
        return model

    def begin_valid_epoch(self, epoch, model):
        for each in (self._found, self._figures, self._windows):
            each.clear()

    def valid_step(self, sample, model, criterion):
        watched = Watched(model)
        result = super().valid_step(sample, watched, criterion)
        self.collect(sample, watched.output)
        self._validating = sample["split"]
        return result

    def train_step(self, *args, **kwargs):
        self._validating = None
        return super().train_step(*args, **kwargs)

    def collect(self, sample, scores) -> None:
        """Keep the best answers of a batch of windows; ``scores`` are B x 2 x T."""
        split = sample["split"]
        self._figures.pop(split, None)
        for number, row in zip(sample["id"].tolist(), scores.float().cpu()):
            window = self.datasets[split].windows[number]
            found = candidates(
                row,
                window,
                self._questions[split][window.question].context,
                self._offsets[split][window.question],
                self.cfg.max_answer_length,
                self.cfg.n_best_size,
            )
            null = Candidate(float(row[:, 0].sum()), "", *row[:, 0].tolist())
            self._add(split, window.question, found, null)

    def _add(self, split, question, found, null):
        before, lowest = self._found[split].get(question, ([], null))
        self._found[split][question] = (before + found, min(lowest, null))

    def _share(self, split):
        """Give every worker what all have found; windows of a question may be anywhere."""
        distributed = torch.distributed
        if not distributed.is_available() or not distributed.is_initialized():
            return
        everyone = [None] * distributed.get_world_size()
        distributed.all_gather_object(everyone, self._found.pop(split, {}))
        for each in everyone:
            for question, found in each.items():
                self._add(split, question, *found)

    def answers(self, split: str):
        """What was collected of a split, by the questions' ids: answers, lists of the best ones, and in version 2 by
        how much "no answer" scores above the best answer."""
        answers, lists, odds = {}, {}, {}
        for number, (found, null) in self._found[split].items():
            question, version_2 = self._questions[split][number], self._version_2[split]
            answers[question.id], lists[question.id], above = concluded(
                found, null if version_2 else None, self.cfg.n_best_size, self.cfg.null_threshold
            )
            if version_2:
                odds[question.id] = above
        return answers, lists, odds

    def evaluate(self, split: str) -> Dict[str, float]:
        """The official figures of what was collected of a split, in version 2 with those of the best thresholds."""
        answers, lists, odds = self.answers(split)
        questions = [each for each in self._questions[split] if each.id in answers]
        figures = squad_answers.evaluate(questions, answers, self._version_2[split])
        if self._version_2[split]:
            texts = {name: next((each["text"] for each in best if each["text"]), "") for name, best in lists.items()}
            figures.update(squad_answers.best_threshold(questions, texts, odds))
        return figures

    def has_answers(self, split: str) -> bool:
        return any(question.answers or question.impossible for question in self._questions[split])

    def reduce_metrics(self, logging_outputs, criterion):
        super().reduce_metrics(logging_outputs, criterion)
        split = self._validating
        if split is not None:
            windows = sum(float(log.get("nsentences", 0)) for log in logging_outputs)
            self._windows[split] += windows
            metrics.log_scalar_sum("_windows", windows)
            for name, figure in (("em", "exact"), ("f1", "f1")):
                metrics.log_derived(name, functools.partial(self._official, split, figure))

    def _official(self, split, figure, meters):
        if meters["_windows"].sum < self._windows[split]:
            return math.nan  # fairseq also asks, in vain, for the figures of every single batch
        if split not in self._figures:
            self._share(split)
            self._figures[split] = self.evaluate(split)
        return round(self._figures[split][figure], 2)

    def max_positions(self):
        return self.cfg.max_positions

    @property
    def source_dictionary(self):
        return self.dictionary

    @property
    def target_dictionary(self):
        return self.dictionary

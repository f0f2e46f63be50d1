"""Questions to answers with a fine-tuned model."""

import os
from typing import Dict, List, NamedTuple, Optional

import fairseq_adaptive.plugin  # noqa: F401  first: patches fairseq, loads safely, and is quiet

# isort: split
import torch
from fairseq import checkpoint_utils, tasks
from fairseq.data import data_utils
from omegaconf import OmegaConf

from fairseq_adaptive.data.squad import Question
from fairseq_adaptive.data.squad_answers import Candidate, candidates, concluded
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.interop.checkpoint import load_checkpoint
from fairseq_adaptive.models.int8 import in_int8
from fairseq_adaptive.modules import recording
from fairseq_adaptive.modules.layers.prepacked_linear import constant_weights
from fairseq_adaptive.ranges import BATCH


class Answer(NamedTuple):
    """What a model says of a question.

    Attributes:
        text: a part of the context; empty where there is no answer
        probability: among ``best``
        best: the best answers, best first, dictionaries with ``text``, ``probability``, ``start_logit``, ``end_logit``
        null_odds: by how much "no answer" scores above the best answer; None unless the question may be unanswerable
        kept: share of the tokens that layers computed, over all layers; 1 where none was skimmed
    """

    text: str
    probability: float
    best: List[Dict]
    null_odds: Optional[float]
    kept: float


class TranskimmerReader:
    """A model that ``--task question_answering`` has trained: tokens that are skimmed are not computed.

    It may serve several threads at once.

    Attributes:
        model: fairseq's, in evaluation mode
        task: fairseq's

    Example:
        >>> reader = TranskimmerReader.from_pretrained("checkpoints/skim/checkpoint_best.pt")
        >>> reader.answer("Where is Berlin?", "Berlin is in Germany.").text
        'Germany'
    """

    def __init__(self, model, task):
        self.model, self.task = model, task
        model.eval()

    @classmethod
    def from_pretrained(
        cls,
        checkpoint,
        data=None,
        tokenizer=None,
        null_threshold: Optional[float] = None,
        device=None,
        int8: bool = False,
    ) -> "TranskimmerReader":
        """
        Args:
            checkpoint: of ``--task question_answering``
            data: folder with ``dict.txt`` (default: that of the training)
            tokenizer: folder with ``vocab.txt``, or ``vocab.json`` and ``merges.txt`` (default: as in training, which
                is ``data`` unless told otherwise)
            null_threshold: by how much "no answer" must score above the best answer (default: as in training)
            device: (default: a GPU if there is one, with ``int8`` the CPU)
            int8: run the maps of the layers in int8, which only a CPU does

        Raises:
            UsageError: when files are missing, or of another task; where int8 cannot run
        """
        cfg = OmegaConf.create(load_checkpoint(checkpoint)["cfg"], flags={"allow_objects": True})
        if cfg.task._name != "question_answering":
            raise UsageError(f"{checkpoint} was trained with --task {cfg.task._name}, not question_answering")
        for name, value in (("data", data), ("tokenizer", tokenizer), ("null_threshold", null_threshold)):
            if value is not None:
                cfg.task[name] = value if name == "null_threshold" else os.fspath(value)
        task = tasks.setup_task(cfg.task)
        (model,), _ = checkpoint_utils.load_model_ensemble([os.fspath(checkpoint)], task=task)
        model = model.to(device or ("cuda" if torch.cuda.is_available() and not int8 else "cpu")).eval()
        model.make_generation_fast_()
        return cls(in_int8(model) if int8 else model, task)

    @torch.no_grad()
    @constant_weights()
    def answer(self, question: str, context: str, unanswerable: bool = False, batch_size: int = 32) -> Answer:
        """
        Args:
            question, context: texts; a long context is read in windows, as in training
            unanswerable: whether the answer may be that there is none; the model must have been trained on such questions
            batch_size: windows at a time

        Raises:
            UsageError: for what is no text, an empty context, a batch size below 1, and scores that are not finite
        """
        BATCH.check(batch_size, "batch_size")
        for name, text in (("question", question), ("context", context)):
            if not isinstance(text, str):
                raise UsageError(f"the {name} is {text!r}: give a text")
        asked = Question("asked", question, context, (), False)
        cut, cfg = self.task.cut(context), self.task.cfg
        if not cut[0]:
            raise UsageError("the context has no words: give a text that may hold the answer")
        windows = self.task.windows(0, asked, cut)
        found, nulls, computed, there = [], [], 0, 0
        for start in range(0, len(windows), batch_size):
            batch = windows[start : start + batch_size]
            scores, trace = self._scores(batch)
            for window, row in zip(batch, scores):
                found += candidates(row, window, context, cut[1], cfg.max_answer_length, cfg.n_best_size)
                nulls.append(Candidate(float(row[:, 0].sum()), "", *row[:, 0].tolist()))
            computed += int(trace.updates.sum())
            there += int(trace.tokens.sum()) * trace.most
        text, best, odds = concluded(found, min(nulls) if unanswerable else None, cfg.n_best_size, cfg.null_threshold)
        chances = {each["text"]: each["probability"] for each in best}
        return Answer(text, chances.get(text, 0.0), best, odds, computed / there)

    def _scores(self, windows):
        """Scores B x 2 x T of windows, and the trace."""
        tokens = data_utils.collate_tokens(
            [torch.tensor(window.tokens) for window in windows], self.task.source_dictionary.pad()
        )
        with recording(self.model) as traces:
            scores = self.model(tokens.to(next(self.model.parameters()).device), spans=True)[0].float().cpu()
        if any(not row[:, : len(window.tokens)].isfinite().all() for row, window in zip(scores, windows)):
            raise UsageError("the model gives scores that are NaN or infinite: it overflows on this text")
        ((trace,),) = traces.values()
        return scores, trace

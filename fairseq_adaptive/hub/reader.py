"""Questions to answers with a fine-tuned model."""

import os
from typing import Dict, List, NamedTuple, Optional

import torch
from torch import Tensor

from fairseq_adaptive.data.squad import Question
from fairseq_adaptive.data.squad_answers import Candidate, candidates, concluded
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.hub.folder import as_checkpoint, needs_fairseq, origin_of, tokenizer_files
from fairseq_adaptive.hub.loading import default_device, located, trained_state
from fairseq_adaptive.hub.pretrained import Pretrained, padded, shaded, stacks_of
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


class TranskimmerReader(Pretrained):
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
            checkpoint: of ``--task question_answering``, a file; or a folder of :meth:`save_pretrained`, also by its name on
                the Hugging Face hub
            data: folder with ``dict.txt`` (default: that of the training)
            tokenizer: folder with ``vocab.txt``, or ``vocab.json`` and ``merges.txt`` (default: as in training, which
                is ``data`` unless told otherwise)
            null_threshold: by how much "no answer" must score above the best answer (default: as in training)
            device: (default: a GPU if there is one, with ``int8`` the CPU)
            int8: run the maps of the layers in int8, which only a CPU does

        Raises:
            UsageError: when files are missing, or of another task; where int8 cannot run
        """
        source = located(checkpoint)
        needs_fairseq(f"{source}, a model of questions,")
        from fairseq import checkpoint_utils, tasks
        from omegaconf import OmegaConf

        import fairseq_adaptive.plugin  # noqa: F401  patches fairseq, loads safely
        from fairseq_adaptive.models.int8 import in_int8

        with as_checkpoint(source) as (path, folder, _):
            state = trained_state(path, source, "question_answering")
            cfg = OmegaConf.create(state["cfg"], flags={"allow_objects": True})
            given = ("data", data or folder), ("tokenizer", tokenizer or folder), ("null_threshold", null_threshold)
            for name, value in given:
                if value is not None:
                    cfg.task[name] = value if name == "null_threshold" else os.fspath(value)
            task = tasks.setup_task(cfg.task)
            (model,), _ = checkpoint_utils.load_model_ensemble([path], task=task)
        model = model.to(device or default_device(int8)).eval()
        model.make_generation_fast_()
        made = cls(in_int8(model) if int8 else model, task)
        made.origin = origin_of(state, {}, tokenizer_files(cfg.task.get("tokenizer") or cfg.task.data))
        if null_threshold is not None:
            made.origin.flags["task"]["null_threshold"] = null_threshold
        return made

    def encode(self, question: str, context: str) -> Dict[str, Tensor]:
        """``input_ids`` and ``attention_mask``, [windows, T]: what :meth:`answer` reads of a question and its context.

        Raises:
            UsageError: for what is no text, and an empty context
        """
        windows, _ = self._windows(question, context)
        return padded([each.tokens for each in windows], self.task.source_dictionary.pad(), self.device)

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
        (windows, cut), cfg = self._windows(question, context), self.task.cfg
        found, nulls, computed, there, shown = [], [], 0, 0, []
        for start in range(0, len(windows), batch_size):
            batch = windows[start : start + batch_size]
            scores, trace = self._scores(batch)
            for window, row in zip(batch, scores):
                found += candidates(row, window, context, cut[1], cfg.max_answer_length, cfg.n_best_size)
                nulls.append(Candidate(float(row[:, 0].sum()), "", *row[:, 0].tolist()))
            computed += int(trace.updates.sum())
            there += int(trace.tokens.sum()) * trace.most
            shown += self._shaded(batch, trace)
        self._show(shown)
        text, best, odds = concluded(found, min(nulls) if unanswerable else None, cfg.n_best_size, cfg.null_threshold)
        chances = {each["text"]: each["probability"] for each in best}
        return Answer(text, chances.get(text, 0.0), best, odds, computed / there)

    def _windows(self, question, context):
        """The windows of a context with the question, and the context's pieces."""
        for name, text in (("question", question), ("context", context)):
            if not isinstance(text, str):
                raise UsageError(f"the {name} is {text!r}: give a text")
        cut = self.task.cut(context)
        if not cut[0]:
            raise UsageError("the context has no words: give a text that may hold the answer")
        return self.task.windows(0, Question("asked", question, context, (), False), cut), cut

    def _shaded(self, windows, trace):
        words, (stack,) = self.task.source_dictionary, stacks_of(self.model).values()
        shown = ([words[number] for number in window.tokens] for window in windows)
        return [shaded(stack, trace, row, [f"▁{each}" for each in tokens]) for row, tokens in enumerate(shown)]

    def _scores(self, windows):
        """Scores B x 2 x T of windows, and the trace."""
        tokens = padded([window.tokens for window in windows], self.task.source_dictionary.pad(), self.device)
        with self._watched() as traces:
            scores = self.model(tokens["input_ids"], spans=True)[0].float().cpu()
        if any(not row[:, : len(window.tokens)].isfinite().all() for row, window in zip(scores, windows)):
            raise UsageError("the model gives scores that are NaN or infinite: it overflows on this text")
        ((trace,),) = traces.values()
        return scores, trace

"""Raw text to labels with a fine-tuned model, and which tokens it skimmed on the way."""

import os
from typing import Dict, Iterable, List, NamedTuple, Optional, Tuple, Union

import fairseq_adaptive.plugin  # noqa: F401  first: patches fairseq, loads safely, and is quiet

# isort: split
import torch
from fairseq import checkpoint_utils, tasks
from fairseq.data import data_utils
from omegaconf import OmegaConf

from fairseq_adaptive.data.squad import cut, load_tokenizer
from fairseq_adaptive.data.text_pairs import check_vocabulary, join, shorten
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.interop.albert_tokenizer import FILE, AlbertTokenizer
from fairseq_adaptive.interop.checkpoint import load_checkpoint
from fairseq_adaptive.models.int8 import in_int8
from fairseq_adaptive.modules import LayerStack, recording
from fairseq_adaptive.modules.layers.prepacked_linear import constant_weights
from fairseq_adaptive.ranges import BATCH
from fairseq_adaptive.report.shading import WORD_START, Sentence


class Prediction(NamedTuple):
    """What a model says of a text.

    Attributes:
        label: the most probable one; of a regression the number
        probabilities: of all labels, the greatest first; of a regression empty
        tokens: what the model read, special tokens among them
        skimmed: for each token the layer before which it was skimmed, counted from 1; None if no layer left it out
        sentence: the text as :mod:`~fairseq_adaptive.report.shading` shows it, with its label: where tokens halt by the number of
            updates, else by the layer that skimmed them
        updates: of each token, how many layers computed it
        tape: how many tape tokens the model read, of ``--arch adatape``; None: it has no tape
    """

    label: Union[str, float]
    probabilities: Dict[str, float]
    tokens: List[str]
    skimmed: List[Optional[int]]
    sentence: Sentence
    updates: List[int] = []
    tape: Optional[int] = None


class _Row(NamedTuple):
    tokens: List[int]
    pieces: List[str]  # as the model names them
    shown: List[str]  # as they stand in the text


class TranskimmerClassifier:
    """A model that ``--task sentence_prediction`` has trained, a Transkimmer or another one: tokens that are skimmed or
    have halted are not computed, and of an AdaTape each prediction tells the length of its tape.

    Example:
        >>> classifier = TranskimmerClassifier.from_pretrained("checkpoints/skim/checkpoint_best.pt")
        >>> classifier.predict(["a good film"])[0].label
        'positive'

    Attributes:
        model: fairseq's, in evaluation mode
        labels: in the order of the model's output; of a regression empty
    """

    def __init__(self, model, task, tokenizer, max_length: Optional[int] = None):
        self.model, self.task, self._tokenizer = model.eval(), task, tokenizer
        self.max_length = model.max_positions() if max_length is None else min(max_length, model.max_positions())
        if self.max_length < 4:
            raise UsageError(f"a length of {max_length} is impossible: special tokens take up to 4")
        self.labels = (
            []
            if task.cfg.regression_target
            else [
                task.label_dictionary[task.label_dictionary.nspecial + number] for number in range(task.cfg.num_classes)
            ]
        )
        stacks = {name: module for name, module in model.named_modules() if isinstance(module, LayerStack)}
        self._stack = next((name for name, each in stacks.items() if each.adaptive), None)
        self._skims = self._stack is None or stacks[self._stack].router is not None

    @classmethod
    def from_pretrained(
        cls,
        checkpoint,
        data=None,
        tokenizer=None,
        cased: bool = False,
        max_length: Optional[int] = None,
        device=None,
        int8: bool = False,
    ) -> "TranskimmerClassifier":
        """
        Args:
            checkpoint: of ``--task sentence_prediction``
            data: folder with ``input0/dict.txt`` and ``label/dict.txt`` (default: that of the training)
            tokenizer: folder with ``vocab.txt``, or ``vocab.json`` and ``merges.txt``, or ``spiece.model``; or a
                SentencePiece model, a file (default: ``data``)
            cased: ``vocab.txt`` distinguishes upper and lower case
            max_length: longer texts are cut off at this many tokens (default: what the model can read)
            device: (default: a GPU if there is one, with ``int8`` the CPU)
            int8: run the maps of the layers in int8, which only a CPU does

        Raises:
            UsageError: when files are missing, do not fit each other, or are of another task; where int8 cannot run
        """
        cfg = OmegaConf.create(load_checkpoint(checkpoint)["cfg"], flags={"allow_objects": True})
        if cfg.task._name != "sentence_prediction":
            raise UsageError(f"{checkpoint} was trained with --task {cfg.task._name}, not sentence_prediction")
        if data is not None:
            cfg.task.data = os.fspath(data)
        for part in ("input0",) if cfg.task.regression_target else ("input0", "label"):
            path = os.path.join(cfg.task.data, part, "dict.txt")
            if not os.path.isfile(path):
                raise UsageError(f"there is no {path}: name the folder of the binarised training data")
        task = tasks.setup_task(cfg.task)
        folder = tokenizer or cfg.task.data
        cutter = _tokenizer(folder, cased)
        check_vocabulary(cutter, task.source_dictionary, folder)
        (model,), _ = checkpoint_utils.load_model_ensemble([os.fspath(checkpoint)], task=task)
        model = model.to(device or ("cuda" if torch.cuda.is_available() and not int8 else "cpu"))
        return cls(in_int8(model) if int8 else model, task, cutter, max_length)

    @torch.no_grad()
    @constant_weights()
    def predict(self, texts: Iterable[Union[str, Tuple[str, str]]], batch_size: int = 32) -> List[Prediction]:
        """Return a prediction for each text; an empty one is read as what it is, special tokens alone.

        Args:
            texts: strings, or pairs of strings where the model was trained on pairs
            batch_size: texts at a time

        Raises:
            UsageError: for what is no text, a batch size below 1, and scores that are not finite
        """
        BATCH.check(batch_size, "batch_size")
        rows = [self._read(text) for text in ([texts] if isinstance(texts, str) else texts)]
        order = sorted(range(len(rows)), key=lambda number: len(rows[number].tokens))
        device, predictions = next(self.model.parameters()).device, [None] * len(rows)
        for start in range(0, len(order), batch_size):
            numbers = order[start : start + batch_size]
            tokens = data_utils.collate_tokens(
                [torch.tensor(rows[number].tokens) for number in numbers], self.task.source_dictionary.pad()
            )
            with recording(self.model) as traces:
                logits, _ = self.model(
                    tokens.to(device),
                    features_only=True,
                    classification_head_name=self.task.cfg.classification_head_name,
                )
            updates, layers = None, 1
            if self._stack is not None:
                (trace,) = traces[self._stack]
                updates, layers = trace.updates.tolist(), trace.most
            if not logits.isfinite().all():
                raise UsageError("the model gives scores that are NaN or infinite: it overflows on this text")
            tapes = [each.tape_len.tolist() for (each,) in traces.values() if each.reading is not None]
            for place, number in enumerate(numbers):
                done = updates[place] if updates else [layers] * len(rows[number].tokens)
                said = self._prediction(rows[number], logits[place].float(), done, layers)
                predictions[number] = said._replace(tape=tapes[0][place]) if tapes else said
        return predictions

    def _read(self, text) -> _Row:
        texts = (text,) if isinstance(text, str) else tuple(text)
        if not 1 <= len(texts) <= 2 or not all(isinstance(each, str) for each in texts):
            raise UsageError(f"{text!r} is no text: give a string, or two strings for a pair")
        cfg, dictionary = self.task.cfg, self.task.source_dictionary

        def special(number):
            return None if number is None else (number, dictionary[number], dictionary[number])

        specials = special(dictionary.eos()), special(cfg.init_token), special(cfg.separator_token)
        parts = []
        for each in texts:
            if isinstance(self._tokenizer, AlbertTokenizer):
                pieces = shown = self._tokenizer.tokenize(each)
            else:
                pieces, spans = cut(self._tokenizer, each)
                shown = _as_written(each, spans)
            parts.append([*zip(map(dictionary.index, pieces), pieces, shown)])
        parts = shorten(parts, self.max_length - len(join([[] for _ in parts], *specials)))
        return _Row(*map(list, zip(*join(parts, *specials))))

    def _prediction(self, row: _Row, logits, updates, layers) -> Prediction:
        updates = updates[: len(row.tokens)]
        if self._skims:
            skimmed = [count + 1 if count < layers else None for count in updates]
            depths = [each or layers + 1 for each in skimmed]
            sentence = Sentence(row.shown, depths, layers + 1, "skimmed before layer", "kept")
        else:
            skimmed, sentence = [None] * len(updates), Sentence(row.shown, updates, layers)
        if not self.labels:
            number = float(logits[0])
            return Prediction(number, {}, row.pieces, skimmed, sentence._replace(label=f"{number:.3f}"), updates)
        scores = logits.softmax(-1).tolist()
        ranked = sorted(zip(self.labels, scores), key=lambda each: -each[1])
        sentence = sentence._replace(label=ranked[0][0], probability=ranked[0][1])
        return Prediction(ranked[0][0], dict(ranked), row.pieces, skimmed, sentence, updates)


def _tokenizer(where, cased):
    where = os.fspath(where)
    spm = where if os.path.isfile(where) else os.path.join(where, FILE)
    words = any(os.path.isfile(os.path.join(where, name)) for name in ("vocab.txt", "vocab.json"))
    return AlbertTokenizer(spm) if os.path.isfile(spm) and not words else load_tokenizer(where, cased)[0]


def _as_written(text, spans):
    shown, reached = [], 0
    for start, end in spans:
        gap = reached == 0 or text[reached:start].strip() != text[reached:start]
        shown.append((WORD_START if gap else "") + text[max(start, reached) : end])  # a letter may have several pieces
        reached = max(reached, end)
    return shown

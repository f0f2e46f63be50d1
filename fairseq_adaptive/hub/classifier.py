"""Raw text to labels with a fine-tuned model, and which tokens it skimmed on the way."""

import os
from typing import Dict, Iterable, List, NamedTuple, Optional, Tuple, Union

import torch
from torch import Tensor

from fairseq_adaptive.data.albert_tokenizer import FILE, AlbertTokenizer
from fairseq_adaptive.data.squad import cut, load_tokenizer
from fairseq_adaptive.data.text_pairs import check_vocabulary, join, shorten
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.hub.folder import (
    as_checkpoint,
    as_plain_origin,
    has_fairseq,
    needs_fairseq,
    origin_of,
    tokenizer_files,
)
from fairseq_adaptive.hub.loading import default_device, located, trained_state
from fairseq_adaptive.hub.plain import load_plain, plain_task
from fairseq_adaptive.hub.pretrained import Pretrained, padded, stacks_of
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
        sentence: the text as :mod:`~fairseq_adaptive.report.shading` shows it, with its label: where tokens halt by
            the number of updates, else by the layer that skimmed them
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


class TranskimmerClassifier(Pretrained):
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
        stacks = stacks_of(model)
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
            checkpoint: of ``--task sentence_prediction``, a file; or a folder of :meth:`save_pretrained`, also by its name on
                the Hugging Face hub, which needs no fairseq where the model is a ``transkimmer`` or an ``albert_act``
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
        source = located(checkpoint)
        device = device or default_device(int8)
        if os.path.isdir(source) and not has_fairseq():
            return cls._plain(source, tokenizer, cased, max_length, device, int8)
        needs_fairseq(f"the checkpoint {source}")
        from fairseq import checkpoint_utils, tasks
        from omegaconf import OmegaConf

        import fairseq_adaptive.plugin  # noqa: F401  patches fairseq, loads safely
        from fairseq_adaptive.models.int8 import in_int8

        with as_checkpoint(source) as (path, folder, saved):
            state = trained_state(path, source, "sentence_prediction")
            cfg = OmegaConf.create(state["cfg"], flags={"allow_objects": True})
            data = folder if data is None else data
            if data is not None:
                cfg.task.data = os.fspath(data)
            for part in ("input0",) if cfg.task.regression_target else ("input0", "label"):
                words = os.path.join(cfg.task.data, part, "dict.txt")
                if not os.path.isfile(words):
                    raise UsageError(f"there is no {words}: name the folder of the binarised training data")
            task = tasks.setup_task(cfg.task)
            where, cased = tokenizer or cfg.task.data, cased or bool(saved.get("cased"))
            cutter = _tokenizer(where, cased)
            check_vocabulary(cutter, task.source_dictionary, where)
            (model,), _ = checkpoint_utils.load_model_ensemble([path], task=task)
        model = model.to(device)
        made = cls(
            in_int8(model) if int8 else model,
            task,
            cutter,
            saved.get("max_length") if max_length is None else max_length,
        )
        options = {"cased": cased, "max_length": saved.get("max_length") if max_length is None else max_length}
        made.origin = origin_of(state, options, tokenizer_files(where))
        return made

    @classmethod
    def _plain(cls, folder, tokenizer, cased, max_length, device, int8) -> "TranskimmerClassifier":
        """From a folder, with torch and safetensors alone."""
        if int8:
            raise UsageError("int8 is for fairseq's models: leave it out, or install fairseq")
        model, config = load_plain(folder)
        task, saved, where = plain_task(folder, config), config["options"], tokenizer or folder
        cutter = _tokenizer(where, cased or bool(saved.get("cased")))
        check_vocabulary(cutter, task.source_dictionary, where)
        made = cls(model.to(device), task, cutter, saved.get("max_length") if max_length is None else max_length)
        made.origin = as_plain_origin(folder, config)
        return made

    def encode(self, texts: Iterable[Union[str, Tuple[str, str]]]) -> Dict[str, Tensor]:
        """``input_ids`` and ``attention_mask``, [B, T], with special tokens; what :meth:`predict` reads.

        Raises:
            UsageError: for what is no text
        """
        rows = [self._read(text).tokens for text in ([texts] if isinstance(texts, str) else texts)]
        return padded(rows, self.task.source_dictionary.pad(), self.device)

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
        predictions: List[Optional[Prediction]] = [None] * len(rows)
        for start in range(0, len(order), batch_size):
            numbers = order[start : start + batch_size]
            tokens = padded([rows[number].tokens for number in numbers], self.task.source_dictionary.pad(), self.device)
            with self._watched() as traces:
                logits, _ = self.model(
                    tokens["input_ids"],
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
        self._show(
            [each.sentence for each in predictions], [each.tape for each in predictions if each.tape is not None]
        )
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
            pieces, shown = pieces_of(self._tokenizer, each)
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


def pieces_of(tokenizer, text: str) -> Tuple[List[str], List[str]]:
    """The pieces of a text, and as they stand there; without a tokenizer it is cut at spaces."""
    if tokenizer is None:
        return text.split(), [WORD_START + each for each in text.split()]
    if isinstance(tokenizer, AlbertTokenizer):
        pieces = tokenizer.tokenize(text)
        return pieces, pieces
    pieces, spans = cut(tokenizer, text)
    return pieces, _as_written(text, spans)


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

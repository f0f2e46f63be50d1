"""Pretrained encoders: the words that fit the gaps of a text."""

import os
from typing import Dict, Iterable, List, NamedTuple, Tuple, Union

import torch
from torch import Tensor

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.hub.classifier import _tokenizer, pieces_of
from fairseq_adaptive.hub.folder import as_checkpoint, needs_fairseq, origin_of, tokenizer_files
from fairseq_adaptive.hub.loading import default_device, located, trained_state
from fairseq_adaptive.hub.pretrained import Pretrained, padded, shaded, stacks_of, texts_of
from fairseq_adaptive.modules.layers.prepacked_linear import constant_weights
from fairseq_adaptive.ranges import BATCH, Range

MASK = "<mask>"


class Gap(NamedTuple):
    """The words that fit a gap, the most probable first, with their probabilities."""

    words: List[Tuple[str, float]]


class MaskedLanguageModel(Pretrained):
    """A model that ``--task masked_lm`` or ``masked_lm_sop`` has trained.

    Example:
        >>> model = MaskedLanguageModel.from_pretrained("checkpoint_best.pt", tokenizer="FOLDER")
        >>> model.predict("the <mask> jumps over the dog .")[0].words[0]
        ('fox', 0.41)
    """

    tasks = ("masked_lm", "masked_lm_sop")

    def __init__(self, model, task, tokenizer=None):
        self.model, self.task, self._tokenizer = model.eval(), task, tokenizer

    @classmethod
    def from_pretrained(
        cls, source, data=None, tokenizer=None, cased: bool = False, device=None
    ) -> "MaskedLanguageModel":
        """
        Args:
            source: a checkpoint, a folder of :meth:`save_pretrained`, or the name of such a folder on the Hugging Face hub
            data: folder with ``dict.txt`` (default: that of the training)
            tokenizer: folder with ``vocab.txt``, or ``vocab.json`` and ``merges.txt``, or ``spiece.model``; or a
                SentencePiece model (default: ``data``; where nothing of it is there, texts are cut at spaces)
            cased: ``vocab.txt`` distinguishes upper and lower case
            device: (default: a GPU if there is one)

        Raises:
            UsageError: when files are missing, or of another task
        """
        source = located(source)
        needs_fairseq(f"{source}, a model of masked words,")
        import fairseq_adaptive.plugin  # noqa: F401  patches fairseq, loads safely
        from fairseq_adaptive.interop.checkpoint import load_trained

        with as_checkpoint(source) as (path, folder, saved):
            state, data = trained_state(path, source, *cls.tasks), folder if data is None else data
            model, cfg, task = load_trained(path, {} if data is None else {"data": os.fspath(data)})
        where, cased = tokenizer or str(cfg.task.data), cased or bool(saved.get("cased"))
        files = tokenizer_files(where)
        cutter = _tokenizer(where, cased) if files or tokenizer else None
        made = cls(model.to(device or default_device()), task, cutter)
        made.origin = origin_of(state, {"cased": cased}, files)
        return made

    def encode(self, texts: Union[str, Iterable[str]]) -> Dict[str, Tensor]:
        """``input_ids`` and ``attention_mask``, [B, T], with ``<s>`` and ``</s>``; ``<mask>`` in a text is a gap.

        Raises:
            UsageError: for what is no text, or longer than the model reads
        """
        words, rows = self.task.source_dictionary, []
        for text in texts_of(texts):
            row = [words.bos()]
            for number, part in enumerate(text.split(MASK)):
                row += [words.index(MASK)] if number else []
                row += [words.index(piece) for piece in pieces_of(self._tokenizer, part)[0]]
            rows.append([*row, words.eos()])
        most = self.model.max_positions()
        if any(len(row) > most for row in rows):
            raise UsageError(f"a text has {max(map(len, rows))} tokens, but the model reads {most} at most: divide it")
        return padded(rows, words.pad(), self.device)

    @torch.no_grad()
    @constant_weights()
    def predict(self, texts: Union[str, Iterable[str]], best: int = 5, batch_size: int = 32):
        """The words that fit the gaps.

        Args:
            texts: one or several, with ``<mask>``
            best: how many words of each gap
            batch_size: texts at a time

        Returns:
            the :class:`Gap` of each ``<mask>`` of a text; of several texts a list of these

        Raises:
            UsageError: for what is no text, or longer than the model reads, and numbers out of range
        """
        BATCH.check(batch_size, "batch_size")
        Range(int, 1, len(self.task.source_dictionary)).check(best, "best")
        every, words, found, shown = texts_of(texts), self.task.source_dictionary, [], []
        (name, stack), *_ = stacks_of(self.model).items()
        for start in range(0, len(every), batch_size):
            ids = self.encode(every[start : start + batch_size])["input_ids"]
            with self._watched() as traces:
                scores = self.model(ids, features_only=False)[0]
            for row, numbers in enumerate(ids):
                gaps = scores[row, numbers == words.index(MASK)].float().softmax(-1).topk(best)
                pairs = zip(gaps.values.tolist(), gaps.indices.tolist())
                found.append([Gap([(words[number], each) for each, number in zip(*pair)]) for pair in pairs])
                tokens = [words[number] for number in numbers[numbers != words.pad()].tolist()]
                shown.append(
                    shaded(stack, traces[name][-1], row, [each if "▁" in each else f"▁{each}" for each in tokens])
                )
        self._show(shown)
        return found[0] if isinstance(texts, str) else found

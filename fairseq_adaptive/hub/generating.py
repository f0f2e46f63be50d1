"""Translation and language models: raw text in, text and its probability out."""

import math
import os
from argparse import Namespace
from typing import Dict, Iterable, List, NamedTuple, Optional, Sequence, Union

import torch
from torch import Tensor

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.hub.folder import as_checkpoint, needs_fairseq, origin_of
from fairseq_adaptive.hub.loading import default_device, located, trained_state
from fairseq_adaptive.hub.pretrained import Pretrained, padded, shaded, stacks_of, texts_of
from fairseq_adaptive.modules.layers.prepacked_linear import constant_weights
from fairseq_adaptive.ranges import BATCH, TEMPERATURE, Range

BEAM, LENGTH = Range(int, 1, 1000), Range(int, 1, 1 << 20)
PIECES = ("subword_nmt", "sentencepiece")


class Scored(NamedTuple):
    """How probable a text is.

    Attributes:
        tokens: in pieces, ``</s>`` last
        log_probabilities: of each, in nats, given those before it
    """

    tokens: List[str]
    log_probabilities: List[float]

    @property
    def total(self) -> float:
        """Of the text, in nats."""
        return math.fsum(self.log_probabilities)

    @property
    def perplexity(self) -> float:
        """Of a token."""
        return math.exp(-self.total / len(self.log_probabilities))


class _Generates(Pretrained):
    """What translation and language models have in common.

    Args:
        model, task: fairseq's
        cfg: fairseq's configuration
        words: cuts and joins words, fairseq's ``tokenizer``, or None
        pieces: cuts and joins pieces of words, fairseq's ``bpe``, or None
    """

    tasks = ()

    def __init__(self, model, task, cfg, words=None, pieces=None):
        from fairseq.hub_utils import GeneratorHubInterface

        cfg.bpe = cfg.tokenizer = None  # given here, and no path of the machine of the training
        self.model, self.task = model.eval(), task
        self._hub = GeneratorHubInterface(cfg, task, [model])
        self._hub.tokenizer, self._hub.bpe = words, pieces

    @classmethod
    def from_pretrained(
        cls, source, data=None, tokenizer: Optional[str] = None, bpe: Optional[str] = None, codes=None, device=None
    ):
        """
        Args:
            source: a checkpoint, a folder of :meth:`save_pretrained`, or the name of such a folder on the Hugging Face hub
            data: folder with the dictionaries (default: that of the training)
            tokenizer: ``moses``, where words were cut so (default: texts are cut at spaces)
            bpe: ``subword_nmt`` or ``sentencepiece``, where words were cut into pieces
            codes: the file of ``bpe``
            device: (default: a GPU if there is one)

        Raises:
            UsageError: when files are missing, do not fit each other, or are of another task
        """
        source = located(source)
        needs_fairseq(f"{source}, a model that writes texts,")
        import fairseq_adaptive.plugin  # noqa: F401  patches fairseq, loads safely
        from fairseq_adaptive.interop.checkpoint import load_trained

        with as_checkpoint(source) as (path, folder, saved):
            state = trained_state(path, source, *cls.tasks)
            data = folder if data is None else data
            model, cfg, task = load_trained(path, {} if data is None else {"data": os.fspath(data)})
        tokenizer, bpe = tokenizer or saved.get("tokenizer"), bpe or saved.get("bpe")
        if codes is None and saved.get("bpe") and folder is not None:
            codes = os.path.join(folder, "codes")
        words, pieces = _words(tokenizer, state["cfg"]["task"]), _pieces(bpe, codes)
        model.to(device or default_device())
        made = cls(model, task, cfg, words, pieces)
        made._hub.to(made.device)
        files = {} if bpe is None else {"codes": os.fspath(codes)}
        made.origin = origin_of(state, {"tokenizer": tokenizer, "bpe": bpe}, files)
        flags = made.origin.flags["task"]
        for side in {"source_lang", "target_lang"} & {*flags}:
            flags[side] = getattr(task.cfg, side)  # fairseq infers them from the binarised data, which a folder has not
        return made

    @property
    def longest(self) -> int:
        """How many tokens a text may have, ``</s>`` included."""
        most = self._hub.max_positions
        return int(min(most) if isinstance(most, (tuple, list)) else most)

    def _rows(self, texts, words) -> List[List[int]]:
        rows = []
        for text in texts_of(texts):
            cut = self._hub.apply_bpe(self._hub.tokenize(text))
            numbers = words.encode_line(cut, add_if_not_exist=False, append_eos=True).tolist()
            if len(numbers) > self.longest:
                raise UsageError(
                    f"a text has {len(numbers)} tokens, but the model reads {self.longest} at most: divide it"
                )
            rows.append(numbers)
        return rows

    def encode(self, texts: Union[str, Iterable[str]]) -> Dict[str, Tensor]:
        """``input_ids`` and ``attention_mask``, [B, T], with ``</s>`` behind each text.

        Raises:
            UsageError: for what is no text, or longer than the model reads
        """
        words = self.task.source_dictionary
        return padded(self._rows(texts, words), words.pad(), self.device)

    def _search(self, rows: Sequence[Sequence[int]], beam: int, batch_size: int, **options) -> List[Dict]:
        """The best hypothesis of each row."""
        found = []
        for start in range(0, len(rows), batch_size):
            part = [torch.tensor(row) for row in rows[start : start + batch_size]]
            found += self._hub.generate(part, beam=beam, **options)
        return [hypotheses[0] for hypotheses in found]

    def _shaded(self, traces, rows: Dict[str, Sequence[Sequence[int]]], words: Dict) -> List:
        """Texts by the depth of their tokens, of each side that has policies: rows of numbers by ``encoder``, ``decoder``."""
        stacks, found = stacks_of(self.model), []
        shown = [name for name, stack in stacks.items() if stack.adaptive] or list(stacks)[-1:]
        for name in shown:
            side = name.partition(".")[0]
            for row, numbers in enumerate(rows.get(side, ())):
                tokens = [f"▁{words[side][number]}" for number in numbers]
                found.append(shaded(stacks[name], traces[name][-1], row, tokens))
        return found


class Translator(_Generates):
    """A model that ``--task translation`` has trained.

    Example:
        >>> translator = Translator.from_pretrained("checkpoint_best.pt", bpe="subword_nmt", codes="codes")
        >>> translator.translate(["a man rides a bike ."])
        ['ein mann fährt fahrrad .']
    """

    tasks = ("translation",)

    @torch.no_grad()
    @constant_weights()
    def translate(
        self, texts: Union[str, Iterable[str]], beam: int = 5, batch_size: int = 32, **options
    ) -> Union[str, List[str]]:
        """Translations, a text for a text.

        Args:
            texts: one or several
            beam: hypotheses that are kept
            batch_size: texts at a time
            options: of fairseq's generation, such as ``lenpen`` and ``max_len_b``

        Raises:
            UsageError: for what is no text, or longer than the model reads, and numbers out of range
        """
        BEAM.check(beam, "beam")
        BATCH.check(batch_size, "batch_size")
        rows = self._rows(texts, self.task.source_dictionary)
        found = [each["tokens"].tolist() for each in self._search(rows, beam, batch_size, **options)]
        if rows:
            self._force(rows[-batch_size:], found[-batch_size:])
        said = [self._hub.decode(torch.tensor(numbers)) for numbers in found]
        return said[0] if isinstance(texts, str) else said

    @torch.no_grad()
    @constant_weights()
    def score(
        self, sources: Union[str, Iterable[str]], targets: Union[str, Iterable[str]], batch_size: int = 32
    ) -> Union[Scored, List[Scored]]:
        """How probable translations are.

        Args:
            sources, targets: one text each, or as many of both
            batch_size: pairs at a time

        Raises:
            UsageError: for what is no text, other numbers of sources and targets, and numbers out of range
        """
        BATCH.check(batch_size, "batch_size")
        given, wanted = texts_of(sources), texts_of(targets)
        if len(given) != len(wanted):
            raise UsageError(f"there are {len(given)} sources and {len(wanted)} targets: give as many of both")
        rows = self._rows(given, self.task.source_dictionary)
        answers = self._rows(wanted, self.task.target_dictionary)
        found: List[Scored] = []
        for start in range(0, len(rows), batch_size):
            end = start + batch_size
            scores = self._force(rows[start:end], answers[start:end])
            symbols = self.task.target_dictionary.symbols
            found += [
                Scored([symbols[number] for number in numbers], row[: len(numbers)].tolist())
                for numbers, row in zip(answers[start:end], scores)
            ]
        return found[0] if isinstance(sources, str) else found

    def _force(self, rows, answers) -> Tensor:
        """Log-probabilities [B, T] of given targets, in one pass that leaves a trace of both sides."""
        source, target = self.task.source_dictionary, self.task.target_dictionary
        read, wanted = padded(rows, source.pad(), self.device), padded(answers, target.pad(), self.device)
        shifted = padded([[target.eos(), *row[:-1]] for row in answers], target.pad(), self.device)["input_ids"]
        with self._watched() as traces:
            out = self.model(read["input_ids"], src_lengths=read["attention_mask"].sum(1), prev_output_tokens=shifted)
        sample = {"target": wanted["input_ids"]}
        scores = self.model.get_normalized_probs(out, log_probs=True, sample=sample).float()
        words = {"encoder": source.symbols, "decoder": target.symbols}
        before = [[target.eos(), *row[:-1]] for row in answers]
        self._show(self._shaded(traces, {"encoder": rows, "decoder": before}, words))
        return scores.gather(2, wanted["input_ids"].unsqueeze(2)).squeeze(2)


class LanguageModel(_Generates):
    """A model that ``--task language_modeling`` or ``segmented_language_modeling`` has trained. Each text begins anew.

    Example:
        >>> model = LanguageModel.from_pretrained("checkpoint_best.pt")
        >>> model.score("the fox jumps over the dog .").perplexity
    """

    tasks = ("language_modeling", "segmented_language_modeling")

    @torch.no_grad()
    @constant_weights()
    def score(self, texts: Union[str, Iterable[str]], batch_size: int = 32) -> Union[Scored, List[Scored]]:
        """How probable texts are, each by itself, after ``</s>``, which closes it, too.

        Raises:
            UsageError: for what is no text, or longer than the model reads, and numbers out of range
        """
        BATCH.check(batch_size, "batch_size")
        words = self.task.source_dictionary
        rows, found = self._rows(texts, words), []
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            scores = self._force(part)
            for numbers, row in zip(part, scores):
                found.append(Scored([words.symbols[number] for number in numbers], row[: len(numbers)].tolist()))
        return found[0] if isinstance(texts, str) else found

    @torch.no_grad()
    @constant_weights()
    def sample(
        self,
        texts: Union[str, Iterable[str]],
        length: int = 50,
        temperature: float = 1.0,
        topk: int = 0,
        seed: Optional[int] = None,
    ) -> Union[str, List[str]]:
        """Go on with texts, word by word.

        Args:
            texts: how they begin, one or several
            length: the most tokens to add; a text ends at ``</s>``
            temperature: of the probabilities
            topk: draw from so many best words; 0: from all, 1: always the best one
            seed: of the draws (default: torch's state)

        Raises:
            UsageError: for what is no text, or would be longer than the model reads, and numbers out of range
        """
        LENGTH.check(length, "length")
        TEMPERATURE.check(temperature, "temperature")
        Range(int, 0, 1 << 24).check(topk, "topk")
        words = self.task.source_dictionary
        generator = None if seed is None else torch.Generator(self.device).manual_seed(seed)
        said = [self._go_on(row[:-1], length, temperature, topk, generator) for row in self._rows(texts, words)]
        if said:
            self._force(said)
        texts_said = [self._hub.decode(torch.tensor(row)) for row in said]
        return texts_said[0] if isinstance(texts, str) else texts_said

    def _go_on(self, row, length, temperature, topk, generator) -> List[int]:
        """The numbers of a text that begins with a row; without a cache: the whole text is read for each word."""
        words, row = self.task.target_dictionary, list(row)
        for _ in range(min(length, self.longest - len(row) - 1)):
            read = torch.tensor([[words.eos(), *row]], device=self.device)
            scores = self._last(read) / temperature
            scores[[words.pad(), words.bos()]] = -math.inf
            if topk:
                best = scores.topk(min(topk, len(scores)))
                scores = torch.full_like(scores, -math.inf).index_copy(0, best.indices, best.values)
            number = int(torch.multinomial(scores.softmax(0), 1, generator=generator))
            if number == words.eos():
                break
            row.append(number)
        return [*row, words.eos()]

    def _last(self, read) -> Tensor:
        """Log-probabilities [V] of what follows."""
        out = self.model(read)
        sample = {"target": read}
        return self.model.get_normalized_probs(out, log_probs=True, sample=sample)[0, -1].float()

    def _force(self, rows) -> Tensor:
        """Log-probabilities [B, T] of texts, in one pass that leaves a trace."""
        words = self.task.target_dictionary
        wanted = padded(rows, words.pad(), self.device)
        before = [[words.eos(), *row[:-1]] for row in rows]
        read = padded(before, words.pad(), self.device)
        with self._watched() as traces:
            out = self.model(read["input_ids"], src_lengths=read["attention_mask"].sum(1))
        scores = self.model.get_normalized_probs(out, log_probs=True, sample={"target": wanted["input_ids"]}).float()
        self._show(self._shaded(traces, {"decoder": before}, {"decoder": words.symbols}))
        return scores.gather(2, wanted["input_ids"].unsqueeze(2)).squeeze(2)


def _words(tokenizer, task):
    """fairseq's tokenizer of a name."""
    if tokenizer is None:
        return None
    from fairseq.data.encoders import TOKENIZER_REGISTRY

    if tokenizer != "moses":
        raise UsageError(f"unknown tokenizer {tokenizer!r}: moses, or none where texts are cut at spaces")
    languages = {f"{side}_lang": task.get(f"{side}_lang") or "en" for side in ("source", "target")}
    rest = {"moses_no_dash_splits": False, "moses_no_escape": False}
    try:
        return TOKENIZER_REGISTRY["moses"](Namespace(**languages, **rest))
    except ImportError as error:
        raise UsageError("to cut words as Moses does, install sacremoses") from error


def _pieces(bpe, codes):
    """fairseq's BPE of a name, and its file."""
    if bpe is None:
        if codes is not None:
            raise UsageError(f"codes are given without bpe: say which, {' or '.join(PIECES)}")
        return None
    from fairseq.data.encoders import BPE_REGISTRY

    if bpe not in PIECES:
        raise UsageError(f"unknown bpe {bpe!r}: {' or '.join(PIECES)}")
    if codes is None or not os.path.isfile(codes):
        raise UsageError(f"there is no file {codes} of --bpe {bpe}: name it with codes")
    codes = os.fspath(codes)
    if bpe == "subword_nmt":
        return BPE_REGISTRY[bpe](Namespace(bpe_codes=codes, bpe_separator="@@"))
    return BPE_REGISTRY[bpe](
        Namespace(sentencepiece_model=codes, sentencepiece_enable_sampling=False, sentencepiece_alpha=None)
    )

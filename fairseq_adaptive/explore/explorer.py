"""What a model makes of one text, and what that costs beside the same weights with all policies off."""

import difflib
import os
import statistics
import threading
import time
from argparse import Namespace
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import torch

from fairseq_adaptive.criterions.decisions import decisions
from fairseq_adaptive.data.subwords import as_in_text
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.explore.dials import Dial, Turned, dials_of
from fairseq_adaptive.hub import TranskimmerClassifier
from fairseq_adaptive.interop.checkpoint import load_checkpoint, load_model, model_options
from fairseq_adaptive.modules import LayerStack, recording
from fairseq_adaptive.modules.layers.prepacked_linear import constant_weights
from fairseq_adaptive.printable import printable
from fairseq_adaptive.report.costs import Costs, has_policies, without_policies
from fairseq_adaptive.report.shading import WORD_START, Sentence

KINDS = {
    "sentence_prediction": "label",
    "translation": "translation",
    "language_modeling": "continuation",
    "segmented_language_modeling": "continuation",
}
LONGEST = 4000  # characters of a text
ROUNDS = 3  # of which the median time counts


class Look(NamedTuple):
    """What :meth:`Explorer.look` saw.

    Attributes:
        said: labels, translations or continuations, each with its probability, None of a regression; the best first
        sentences: source and target, or the text, shaded, by their names
        tape: how many tape tokens were read; None: the model has no tape
        macs: multiply-adds of reading the text and what was said, and with all policies off
        seconds: of the whole, medians of three rounds in turn; the same pair
    """

    said: List[Tuple[str, Optional[float]]]
    sentences: Dict[str, Sentence]
    tape: Optional[int]
    macs: Tuple[float, float]
    seconds: Tuple[float, float]

    @property
    def share(self) -> float:
        """Of the multiply-adds of the counterpart."""
        return self.macs[0] / self.macs[1] if self.macs[1] else 1.0


class Point(NamedTuple):
    """A place on the curve over a dial: its value, the share of the counterpart's multiply-adds, and how like what is said is
    to what full depth says: for a label its probability, for a text the share of equal words, 0 to 1."""

    value: float
    share: float
    likeness: float


class Explorer:
    """A checkpoint of classification, translation or a language model. It may serve several threads, one at a time.

    Args:
        checkpoint: of fairseq, ours or stock
        data: folder of the binarised data (default: that of the training)
        tokenizer: of texts to tokens, with ``tokenize``; of a classifier the folder of its vocabulary (default: the data)
        cased: of a classifier's ``vocab.txt``
        overrides: flags in place of those of the training; not for classifiers

    Attributes:
        kind: ``label``, ``translation`` or ``continuation``
        dials: what can be turned
        pairs: whether it labels pairs of texts
        title, description: of the model, a few words each

    Raises:
        UsageError: for another task, and for files that are missing or do not fit
    """

    def __init__(self, checkpoint, data=None, tokenizer=None, cased=False, overrides: Optional[Dict[str, Any]] = None):
        self.name = os.fspath(checkpoint)
        state = load_checkpoint(checkpoint)
        task, architecture = state["cfg"]["task"]["_name"], model_options(state)["_name"]
        del state
        if task not in KINDS:
            raise UsageError(f"explore reads texts: it knows --task {', '.join(KINDS)}, and {checkpoint} is of {task}")
        self.kind, self.pairs, self._lock = KINDS[task], False, threading.Lock()
        if self.kind == "label":
            if overrides:
                raise UsageError("--model-overrides is not for classifiers")
            if hasattr(tokenizer, "tokenize"):
                raise UsageError("--spm, --codes and --tokenized are not for classifiers: use --tokenizer")
            self._classifier = TranskimmerClassifier.from_pretrained(checkpoint, data, tokenizer, cased, device="cpu")
            self.model = self._classifier.model
            self.pairs = os.path.isdir(os.path.join(self._classifier.task.cfg.data, "input1"))
        else:
            if not hasattr(tokenizer, "tokenize"):
                raise UsageError(
                    "say how the training text was split: --spm with its SentencePiece model, --codes with those of "
                    "subword-nmt, or --tokenized where texts are typed as they were split"
                )
            self._tokenizer = tokenizer
            self.model, self.task = load_model(checkpoint, {**({"data": data} if data else {}), **(overrides or {})})
            self.model.eval()
        self.dials = dials_of(self.model)
        self.adaptive = has_policies(self.model)
        self.title = printable(os.sep.join(os.path.abspath(self.name).split(os.sep)[-2:]))
        said = (
            "policies: " + ", ".join(sorted({each.label for each in decisions(self.model)}))
            if self.adaptive
            else "no policies"
        )
        self.description = f"{printable(str(architecture))}, {said}"

    def look(
        self, text: str, other: str = "", beam: int = 5, words: int = 20, dial: Optional[Dial] = None, value=None
    ) -> Look:
        """Read a text.

        Args:
            text: of up to 4,000 characters
            other: the second one of a pair
            beam: of a search
            words: tokens of a continuation, at most
            dial, value: turned for this text alone

        Raises:
            UsageError: for an empty or too long text, and one that the model cannot read
        """
        with self._lock, Turned(dial, value):
            return self._look(self._checked(text), other, beam, words)

    @torch.no_grad()
    @constant_weights()
    def _look(self, text, other, beam, words) -> Look:
        run, read, look = self._prepare(text, other, beam, words)
        costs = []
        for dense in (False, True)[: 1 + self.adaptive]:
            with without_policies(self.model) if dense else torch.no_grad():
                costs.append(self._counted(read))
        seconds: List[List[float]] = [[], []]
        for _ in range(ROUNDS):
            for dense in (False, True)[: 1 + self.adaptive]:
                with without_policies(self.model) if dense else torch.no_grad():
                    start = time.perf_counter()
                    run()
                    seconds[dense].append(time.perf_counter() - start)
        medians = [statistics.median(each) for each in seconds if each]
        return look._replace(macs=(costs[0], costs[-1]), seconds=(medians[0], medians[-1]))

    @constant_weights()
    def curve(
        self, text: str, dial: Dial, other: str = "", beam: int = 5, words: int = 20, progress=lambda share: None
    ):
        """The :class:`Point` of each value of a dial.

        Args:
            text, other, beam, words: of :meth:`look`
            dial: which
            progress: is told the share that is done
        """
        text, points = self._checked(text), []
        with self._lock, torch.no_grad():
            with without_policies(self.model):
                _, _, full = self._prepare(text, other, beam, words)
            for number, value in enumerate(dial.values):
                with Turned(dial, value):
                    _, read, look = self._prepare(text, other, beam, words)
                    own = self._counted(read)
                    with without_policies(self.model):
                        whole = self._counted(read)
                points.append(Point(value, own / whole if whole else 1.0, self._likeness(look, full)))
                progress((number + 1) / len(dial.values))
        return points

    def _counted(self, read) -> float:
        counted = Costs(self.model)
        counted.count(read)
        return counted.total()

    def _likeness(self, look: Look, full: Look) -> float:
        if full.said[0][1] is None:
            return float(look.said[0][0] == full.said[0][0])
        if self.kind == "label":
            return float(dict(look.said).get(full.said[0][0]) or 0.0)
        return difflib.SequenceMatcher(None, look.said[0][0].split(), full.said[0][0].split(), False).ratio()

    @staticmethod
    def _checked(text):
        if not text.strip():
            raise UsageError("type a text first")
        if len(text) > LONGEST:
            raise UsageError(f"the text has {len(text):,} characters: {LONGEST:,} at most")
        return text

    def _prepare(self, text, other, beam, words):
        """What to time, what to count, and the look without them."""
        if self.kind == "label":
            given = [(text, other) if self.pairs else text]
            found = self._classifier.predict(given)[0]
            said = [*found.probabilities.items()] or [(f"{found.label:.3f}", None)]
            look = Look(said, {"text": found.sentence}, found.tape, (0, 0), (0, 0))
            return (lambda: self._classifier.predict(given),) * 2 + (look,)
        return self._prepare_search(text, beam, words)

    def _prepare_search(self, text, beam, words):
        source = self.task.source_dictionary
        tokens = self._tokenizer.tokenize(" ".join(text.split()))
        if not tokens:
            raise UsageError("the text has no tokens")
        target = self.task.target_dictionary
        translates = self.kind == "translation"
        longest = self.model.max_positions()[0] if translates else self.model.max_positions()
        room = longest - 1 - (not translates)  # for the end, and for a word that goes on
        if len(tokens) > room:
            raise UsageError(f"the text has {len(tokens)} tokens, and there is room for {room}: shorten it")
        words = min(words, longest - 1 - len(tokens))
        numbers = torch.tensor([*(source.index(token) for token in tokens), source.eos()])
        options = {"max_len_a": 2, "max_len_b": 50} if translates else {"max_len_a": 1, "max_len_b": words - 1}
        generator = self.task.build_generator([self.model], Namespace(beam=beam, nbest=min(beam, 3), **options))
        dataset = self.task.build_dataset_for_inference([numbers], [len(numbers)])
        sample = dataset.collater([dataset[0]])

        def run():
            return self.task.inference_step(generator, [self.model], sample)[0]

        found = run()
        best = found[0]["tokens"]
        inputs = {"prev_output_tokens": torch.cat((best.new_tensor([target.eos()]), best[:-1]))[None]}
        if translates:
            inputs.update(src_tokens=numbers[None], src_lengths=torch.tensor([len(numbers)]))
        else:
            inputs = {"src_tokens": inputs["prev_output_tokens"]}

        def read():
            return self.model(**inputs)

        with recording(self.model) as traces:
            read()
        start = 0 if translates else len(tokens)
        said = [
            (self._joined([target[each] for each in one["tokens"][start:].tolist()]), self._chance(one, start))
            for one in found[: min(beam, 3)]
        ]
        written = [
            *tokens[:start],
            *(target[each] for each in best[start:].tolist()),
        ]  # unknown words as they were typed
        shown = {"source": [*tokens, "</s>"], "translation": written} if translates else {"text": written}
        sides = ("encoder", "decoder") if translates else ("decoder",)
        sentences = {
            name: shaded(self._as_in_text(pieces), self.model, traces, side)
            for (name, pieces), side in zip(shown.items(), sides)
        }
        tapes = [int(each.tape_len[0]) for runs in traces.values() for each in runs if each.reading is not None]
        return run, read, Look(said, sentences, tapes[0] if tapes else None, (0, 0), (0, 0))

    @staticmethod
    def _chance(hypothesis, start) -> float:
        return float(hypothesis["positional_scores"][start:].sum().exp())

    def _as_in_text(self, pieces: List[str]) -> List[str]:
        if any(piece.startswith(WORD_START) for piece in pieces) or hasattr(self._tokenizer, "processor"):
            return pieces
        return [piece if piece == "</s>" else each for piece, each in zip(pieces, as_in_text(pieces))]

    def _joined(self, pieces: List[str]) -> str:
        pieces = [piece for piece in pieces if piece != "</s>"]
        return "".join(self._as_in_text(pieces)).replace(WORD_START, " ").strip()


def shaded(tokens: List[str], model, traces, side: str) -> Sentence:
    """Tokens with what the stack of a side did with them: the number of updates, or the layer that skimmed them; in a stock
    stack all layers computed all of them."""
    for name, stack in model.named_modules():
        if isinstance(stack, LayerStack) and f".{side}." in f".{name}" and traces.get(name):
            trace, count = traces[name][-1], len(tokens)
            updates = [int(each) for each in trace.updates[0, :count].tolist()]
            if stack.router is not None and stack.router.monotone and stack.halting is None:
                depths = [each + 1 if each < trace.most else trace.most + 1 for each in updates]
                return Sentence(tokens, depths, trace.most + 1, "skimmed before layer", "kept")
            if stack.router is not None:
                depths = [each + 1 for each in updates]
                return Sentence(tokens, depths, trace.most + 1, "layers that computed it", first=0)
            return Sentence(tokens, updates, trace.most)
    return Sentence(tokens, [1] * len(tokens), 1, "every layer computed every token")

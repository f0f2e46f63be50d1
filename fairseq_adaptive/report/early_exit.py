"""What early exits lose on examples, beside the same model at full depth, and what they cost."""

import json
import math
from argparse import Namespace
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

import torch
from fairseq import utils
from fairseq.utils import resolve_max_positions
from torch import Tensor

from fairseq_adaptive.criterions.decisions import decisions
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.interop.checkpoint import load_checkpoint, load_model, model_options
from fairseq_adaptive.modules import recording
from fairseq_adaptive.modules.layers.prepacked_linear import constant_weights
from fairseq_adaptive.modules.policies import Distributed
from fairseq_adaptive.progress import progress
from fairseq_adaptive.tasks.segmented_language_modeling import takes_memory

KNOBS = ("halting-threshold", "exit-quantile")
CLASSES = ("sentence_prediction", "image_classification", "parity")
TEXTS = ("translation", "language_modeling", "segmented_language_modeling", "masked_lm", "masked_lm_sop")
SIDES = ("", "encoder_", "decoder_")


class Outcome(NamedTuple):
    """What a model did with the examples, in their order.

    Attributes:
        scores: of each example: of ``accuracy`` whether its label was right, of ``disagreement`` the number of the class, of
            ``nll`` the mean nats of a target token, of ``bleu`` and ``chrf`` the score of its translation, 0 to 100
        depth: mean number of updates of a token, over the stacks in which tokens halt
        macs: multiply-adds of these stacks; None: a layer does not say what it costs
    """

    scores: List[float]
    depth: float
    macs: Optional[float]


def losses(measure: str, full: Sequence[float], early: Sequence[float]) -> List[float]:
    """The loss of each example, in [0, 1]: what it lost against full depth.

    - ``accuracy``: 1 where full depth was right and the early exit is not
    - ``disagreement``: 1 where they say different classes
    - ``nll``: by how many nats a target token costs more, in the mean over the example, cut off at 0 and 1
    - ``bleu``, ``chrf``: by how many points the translation's score is lower, divided by 100
    """
    pairs = list(zip(full, early, strict=True))
    if measure == "accuracy":
        return [float(one > other) for one, other in pairs]
    if measure == "disagreement":
        return [float(one != other) for one, other in pairs]
    if measure == "nll":
        return [min(1.0, max(0.0, other - one)) for one, other in pairs]
    return [max(0.0, one - other) / 100 for one, other in pairs]


class EarlyExits:
    """A checkpoint with its examples.

    Args:
        checkpoint: of any family, with a halting rule
        data: in place of the data of the training
        subset: which split
        knob: one of :data:`KNOBS`
        measure: what :func:`losses` knows
        batch_size: examples at a time
        overrides: flags in place of those of the training
        beam, post_process: of a translation's search, and how its subwords are joined; None: they are not
        device: where to compute

    Raises:
        UsageError: for a model without a halting rule or without the knob, a measure that is not of this task, and a task
            whose examples depend on each other
    """

    def __init__(
        self,
        checkpoint,
        data,
        subset,
        knob,
        measure,
        batch_size=32,
        overrides=None,
        beam=5,
        post_process=None,
        device="cpu",
    ):
        overrides = dict(overrides or {})
        self.knob, self.measure, self._post_process = knob, measure, post_process
        state = load_checkpoint(checkpoint)
        self._options, self._task = {**model_options(state), **overrides}, state["cfg"]["task"]
        self.model, self.task = load_model(checkpoint, {**({"data": str(data)} if data else {}), **overrides})
        self.model = self.model.to(device).eval()
        self._halting = [each for each in decisions(self.model) if each.policy.kind == "halting"]
        self.rules = [each.policy for each in self._halting]
        self._check()
        self._batches = self._read(subset, batch_size)
        self.examples = sum(len(self._target(each)) for each in self._batches)
        self._generator = None
        if measure in ("bleu", "chrf"):
            self._generator = self.task.build_generator([self.model], Namespace(beam=beam))

    def _check(self):
        if not self.rules:
            raise UsageError(
                "no tokens halt in this model, so there is nothing to calibrate: train it with --halting, or exit by "
                "confidence, --model-overrides \"{'halting': 'saturation'}\""
            )
        for rule in self.rules:
            if self.knob == "exit-quantile" and not isinstance(rule, Distributed):
                rule.exit_at(1.0)  # refuses with the reason
            if not hasattr(rule, "threshold"):
                raise UsageError(f"--halting {rule.policy_name} has no threshold: choose another halting rule")
        for side in SIDES:
            if "threshold" in json.loads(self._options.get(f"{side}halting_args") or "{}"):
                raise UsageError(
                    "the threshold of this model is in its --halting-args, where no other flag changes it: leave it out "
                    "there with --model-overrides \"{'halting_args': None}\""
                )
        self.trained = [rule.threshold for rule in self.rules]
        name = self._task["_name"]
        classes = name in CLASSES
        if not classes and name not in TEXTS:
            raise UsageError(f"calibrate does not know --task {name}")
        if name == "segmented_language_modeling" and takes_memory(self.model):
            raise UsageError(
                "a model with a memory reads its text in order: a segment depends on those before, and the guarantee needs "
                "examples that do not"
            )
        if self._task.get("regression_target"):
            raise UsageError("a regression has no classes and no likelihood: no loss of calibrate fits it")
        fit = ("accuracy", "disagreement", "nll") if classes else ("nll",)
        fit = ("bleu", "chrf", "nll") if name == "translation" else fit
        if self.measure not in fit:
            raise UsageError(f"--loss {self.measure} is not for --task {name}: use {' or '.join(fit)}")

    def _read(self, subset, batch_size):
        self.task.load_dataset(subset)
        batches = self.task.get_batch_iterator(
            self.task.dataset(subset),
            max_sentences=batch_size,
            max_positions=resolve_max_positions(self.task.max_positions(), self.model.max_positions()),
            ignore_invalid_inputs=True,
            num_workers=0,
        ).next_epoch_itr(shuffle=False)
        return [each for each in batches if each]

    def full_depth(self) -> None:
        """Rules that halt in training go as deep as they were trained to, others to the last depth."""
        for rule, threshold in zip(self.rules, self.trained):
            rule.quantile, rule.threshold = None, threshold if rule.halts_in_training else math.inf

    def turn(self, value: float) -> None:
        """Set the knob of all rules."""
        self.full_depth()
        for rule in self.rules:
            if self.knob == "exit-quantile":
                rule.exit_at(value)
            else:
                rule.threshold = value

    def overrides(self, value: float) -> Dict[str, Any]:
        """What ``--model-overrides`` takes to set the knob in other commands, where flags of the training stay."""
        name, other = (each.replace("-", "_") for each in (self.knob, *set(KNOBS) - {self.knob}))
        own = [f"{side}{name}" for side in SIDES[1:] if self._options.get(f"{side}{name}") is not None]
        found = {**dict.fromkeys((name, *own), value)}
        if self.knob == "halting-threshold" or not all(rule.halts_in_training for rule in self.rules):
            given = (f"{side}{other}" for side in SIDES)
            found.update({each: None for each in given if self._options.get(each) is not None})
        return found

    @constant_weights()
    @torch.no_grad()
    def run(self) -> Outcome:
        """Run all examples with the knob as it is; of a translation the costs are those of reading the reference.

        Raises:
            UsageError: for a score that is not finite
        """
        device = next(self.model.parameters()).device
        scores, updates, tokens, macs = [], 0.0, 0.0, 0.0
        for sample in progress(self._batches, "examples"):
            sample = utils.move_to_cuda(sample) if device.type == "cuda" else sample
            with recording(self.model) as traces:
                found = self._score(sample)
            scores += self._translate(sample) if self._generator else found.tolist()
            for each in self._halting:
                for trace in traces[each.name]:
                    updates, tokens = updates + float(trace.updates.sum()), tokens + float(trace.tokens.sum())
                    spent = each.ran(trace, training=False).macs
                    macs = None if spent is None or macs is None else macs + float(spent[0])
        if not all(map(math.isfinite, scores)):
            raise UsageError("the model gives scores that are NaN or infinite: it overflows on these examples")
        return Outcome(scores, updates / max(tokens, 1), macs)

    def _target(self, sample) -> Tensor:
        target = sample["target"]
        return target.view(-1) if self._task["_name"] == "sentence_prediction" else target

    def _score(self, sample) -> Tensor:
        net_input, target = sample["net_input"], self._target(sample)
        if self._task["_name"] == "sentence_prediction":
            head = self._task["classification_head_name"]
            logits = self.model(**net_input, features_only=True, classification_head_name=head)[0]
            log_probs = logits.float().log_softmax(-1)
        else:
            out = self.model(**net_input)
            log_probs = self.model.get_normalized_probs(out, log_probs=True, sample=sample)
        if self.measure in ("accuracy", "disagreement"):
            said = log_probs.argmax(-1)
            return said.eq(target).double() if self.measure == "accuracy" else said.double()
        log_probs = log_probs.view(*target.shape, -1)
        nll = -log_probs.gather(-1, target.unsqueeze(-1)).squeeze(-1).double()
        if target.dim() == 1:
            return nll
        real = target.ne(self.task.target_dictionary.pad())
        return nll.masked_fill(~real, 0).sum(1) / real.sum(1).clamp_min(1)

    def _translate(self, sample) -> List[float]:
        from sacrebleu import sentence_bleu, sentence_chrf

        words, measure = self.task.target_dictionary, {"bleu": sentence_bleu, "chrf": sentence_chrf}[self.measure]
        found = self.task.inference_step(self._generator, [self.model], sample)
        texts = lambda tokens, **more: words.string(tokens.int().cpu(), self._post_process, **more)  # noqa: E731
        references = [texts(utils.strip_pad(each, words.pad()), escape_unk=True) for each in sample["target"]]
        return [measure(texts(best[0]["tokens"]), [text]).score for best, text in zip(found, references, strict=True)]

"""A trained model on a subset of its data: the batches that it is measured on, what it spends on them, and how good it is."""

import contextlib
import ctypes
import math
import statistics
import time
from typing import Any, Dict, List, Optional, Tuple

import torch
from fairseq import utils
from fairseq.logging import metrics

from fairseq_adaptive.criterions.distillation import without_teacher
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.interop.checkpoint import load_trained
from fairseq_adaptive.modules import LayerStack, recording
from fairseq_adaptive.modules.layers.prepacked_linear import constant_weights
from fairseq_adaptive.report.costs import Costs, has_policies, stacks_of, without_policies

_RATES = ("bsz", "wpb", "wps")  # fairseq logs them of every batch
_INPUTS = ("src_tokens", "prev_output_tokens")


class Evaluated:
    """A checkpoint and what it is measured on.

    The loss is that of the checkpoint's criterion. A teacher is left out, and for costs and times the prices of policies
    are, too: their counterpart has none. Weights of attention that nobody asked for are not computed, as in
    ``fairseq-generate``.

    Args:
        path: of the checkpoint
        data: folder of the data (default: that of the training)
        subset: which part of it
        batch_size: texts a batch
        texts: how many texts costs and times are measured on, at least one batch; of streams of segments the first ones,
            else batches of all lengths

    Attributes:
        model, cfg, task, criterion: of the checkpoint
        batches: that costs and times are measured on
        texts, tokens: how many there are in them: rows, and what the stacks read of source and target; no padding

    Raises:
        UsageError: for what is no checkpoint, and for data that do not fit
    """

    def __init__(self, path, data: Optional[str] = None, subset="valid", batch_size=8, texts=256):
        self.path, self.subset, self.batch_size = str(path), subset, batch_size
        overrides = {"distill_from": None} if data is None else {"distill_from": None, "data": data}
        self.model, self.cfg, self.task = load_trained(path, overrides)
        self.model.eval()
        for module in self.model.modules():
            if hasattr(module, "need_attn"):
                module.need_attn = False
        self.criterion = self.task.build_criterion(without_teacher(self.cfg.criterion)).eval()
        self._plain = self.criterion
        while getattr(self._plain, "task_criterion", None) is not None:
            self._plain = self._plain.task_criterion
        try:
            self.task.load_dataset(subset, combine=False, epoch=1, task_cfg=self.cfg.task)
        except KeyError as error:
            raise UsageError(f"{self.path}: its data have no subset {subset}") from error
        self.batches = self._choose(texts)
        self.texts = sum(int(batch["nsentences"]) for batch in self.batches)
        self.tokens: float = sum(map(self._tokens, self.batches))  # 0: known once the model has run

    def _all(self):
        """The batches of the subset, in order."""
        return self.task.get_batch_iterator(
            self.task.dataset(self.subset),
            max_sentences=self.batch_size,
            max_positions=utils.resolve_max_positions(self.task.max_positions(), self.model.max_positions()),
            ignore_invalid_inputs=self.cfg.dataset.skip_invalid_size_inputs_valid_test,
            seed=1,
            disable_iterator_cache=True,  # each time the same words are masked
        ).next_epoch_itr(shuffle=False)

    def _choose(self, texts) -> List[Dict]:
        batches = self._all()
        count, number = max(1, -(-texts // self.batch_size)), len(batches)
        spread = {place * number // count for place in range(min(count, number))} if count < number else range(number)
        chosen = []
        for place, batch in enumerate(batches):
            streams = "segment" in batch
            if batch and (streams or place in spread):
                chosen.append(batch)
            if streams and len(chosen) == count:
                break
        if not chosen:
            raise UsageError(f"{self.subset} of {self.path} has no text that the model can read: take another subset")
        return chosen

    def _tokens(self, batch) -> int:
        given = [each for name, each in batch["net_input"].items() if name in _INPUTS and each is not None]
        return sum(int((each != self.task.source_dictionary.pad()).sum()) for each in given)

    def to(self, device: str) -> "Evaluated":
        """Move the model and its batches."""
        self.model, self.criterion = self.model.to(device), self.criterion.to(device)
        self._plain = self._plain.to(device)
        self.batches = [_moved(batch, device) for batch in self.batches]
        return self

    @property
    def has_counterpart(self) -> bool:
        return has_policies(self.model)

    def counterpart(self):
        """A context in which the model's policies are off."""
        return without_policies(self.model)

    @torch.no_grad()
    def run(self, batches: Optional[List[Dict]] = None) -> None:
        """Compute the loss of the task on the measured batches, or some of them."""
        for batch in self.batches if batches is None else batches:
            # a segment gets the memory of those before it
            self._plain(self.model, self.task.evaluated(batch) if hasattr(self.task, "evaluated") else batch)

    def costs(self) -> Costs:
        """The multiply-adds of all measured batches."""
        self.run(self.batches[:1])  # what is made once is no part of it
        costs = Costs(self.model)
        costs.count(self.run)
        return costs

    def shares(self) -> Dict[str, Dict[str, Any]]:
        """What the policies of each stack decide, see :func:`shares_of`."""
        traces: Dict[str, List] = {}
        for batch in self.batches:
            with recording(self.model) as found:
                self.run([batch])
            for name, each in found.items():
                traces.setdefault(name, []).extend(each)
        stacks = stacks_of(self.model)
        found = {name: shares_of(stack, traces.get(name, [])) for name, stack in stacks.items()}
        if not self.tokens:
            self.tokens = sum(each["tokens"] for each in found.values())
        return found

    @torch.no_grad()
    def quality(self) -> Dict[str, Any]:
        """What a validation of the whole subset logs, by the criterion of the checkpoint: names and values."""
        device, logs = next(self.model.parameters()).device, []
        with constant_weights():
            for batch in self._all():
                logs.append(self.task.valid_step(_moved(batch, device), self.model, self.criterion)[2])
        with metrics.aggregate(new_root=True) as values:
            self.task.reduce_metrics(logs, self.criterion)
            found = values.get_smoothed_values()
        found = {name: float(each) if torch.is_tensor(each) else each for name, each in found.items()}
        return {
            name: None if isinstance(each, float) and not math.isfinite(each) else each
            for name, each in found.items()
            if name not in _RATES
        }


def shares_of(stack, traces) -> Dict[str, Any]:
    """What was decided in some runs of a stack.

    Args:
        stack: of a model; of a stock one all tokens are computed at all depths
        traces: of the runs

    Returns:
        ``tokens``: how many tokens there were, without a tape; ``mean_depth``: the mean number of updates of a token, and
        ``depths``, for each depth ``layer``, its number, and shares of the tokens there: ``alive``, those that were
        computed, ``kept``, those that a router let through, ``halted``, those that were done after it, and ``added``,
        tokens of a tape for each token of the sequences. None where no policy decides that.
    """
    if not isinstance(stack, LayerStack) or not traces:
        layers = stack.schedule if isinstance(stack, LayerStack) else range(len(stack))
        depths = [{"layer": layer, "alive": 1.0, "kept": None, "halted": None, "added": None} for layer in layers]
        return {"tokens": 0, "mean_depth": float(len(stack)), "depths": depths}
    own = sum(int(trace.tokens[:, : trace.tokens.size(1) - trace.tape_room].sum()) for trace in traces)
    depths = []
    for depth, layer in enumerate(stack.schedule):
        there = sum(float(trace.counts()[depth]) for trace in traces)
        steps = [trace.steps[depth] for trace in traces if depth < len(trace.steps)]

        def share(name, policy, steps=steps, there=there):
            values = [getattr(step, name) for step in steps]
            return None if policy is None else sum(float(each.sum()) for each in values if each is not None) / there

        tape = None
        if any(trace.tape_room for trace in traces):
            tape = sum(float(step.tape.sum()) for step in steps if step.tape is not None) / own
        depths.append(
            {
                "layer": layer,
                "alive": share("alive", stack),
                "kept": share("kept", stack.router),
                "halted": share("halted", stack.halting),
                "added": tape,
            }
        )
    tokens = sum(float(trace.tokens.sum()) for trace in traces)
    mean = sum(float(trace.updates.sum()) for trace in traces) / tokens
    return {"tokens": own, "mean_depth": mean, "depths": depths}


def measure(models: List[Evaluated], rounds: int) -> List[List[Tuple[float, Optional[int]]]]:
    """Seconds and peak memory of each model and, where it has one, of its counterpart, all in turn.

    Args:
        models: on one device
        rounds: how often; the medians count, and a round before them is left out

    Returns:
        for each model that of itself and of its counterpart: seconds of all batches, and bytes at the peak above what was
        there before, None where the system does not tell
    """
    runs = [(each, counterpart) for each in models for counterpart in (False, True)[: 1 + each.has_counterpart]]
    found = [[] for _ in runs]
    with constant_weights():
        for turn in range(rounds + 1):
            for (each, counterpart), results in zip(runs, found):
                with each.counterpart() if counterpart else contextlib.nullcontext():
                    result = _timed(each)
                results += [result] if turn else []
    medians = []
    for results in found:
        seconds, peaks = zip(*results)
        medians.append((statistics.median(seconds), None if None in peaks else int(statistics.median(peaks))))
    return [[median for (other, _), median in zip(runs, medians) if other is each] for each in models]


def _timed(evaluated: Evaluated) -> Tuple[float, Optional[int]]:
    device = next(evaluated.model.parameters()).device
    before = _start_memory(device)
    start = time.perf_counter()
    evaluated.run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    if before is None:
        return seconds, None
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident("VmHWM")
    return seconds, max(0, peak - before)


def _start_memory(device) -> Optional[int]:
    """Let the peak begin anew, and return what is taken now, bytes; None where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        ctypes.CDLL(None).malloc_trim(0)  # or freed memory is used again, unseen
        with open("/proc/self/clear_refs", "w") as request:
            request.write("5")
        return _resident("VmRSS")
    except (AttributeError, OSError, StopIteration):
        return None


def _resident(field: str) -> int:
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith(field))


def _moved(batch, device):
    return utils.move_to_cuda(batch, device) if torch.device(device).type == "cuda" else batch

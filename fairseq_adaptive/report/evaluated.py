"""A trained model on a subset of its data: the batches that it is measured on, what it spends there, and how good it is."""

import math
from typing import Any, Dict, List, Optional

import torch
from fairseq import utils
from fairseq.logging import metrics

from fairseq_adaptive.criterions.distillation import without_teacher
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.interop.checkpoint import load_trained
from fairseq_adaptive.modules import recording
from fairseq_adaptive.modules.layers.prepacked_linear import constant_weights
from fairseq_adaptive.progress import progress
from fairseq_adaptive.report.costs import Costs, has_policies, stacks_of, without_policies
from fairseq_adaptive.report.shares import Shares

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
        """What the policies of each stack decide: names, and what :class:`Shares` says."""
        found = {name: Shares(stack) for name, stack in stacks_of(self.model).items()}
        for batch in progress(self.batches, "shares"):
            with recording(self.model) as traces:
                self.run([batch])
            for name, runs in traces.items():
                for trace in runs:
                    found[name].add(trace)
        if not self.tokens:
            self.tokens = sum(each.tokens for each in found.values())
        return {name: each.read() for name, each in found.items()}

    @torch.no_grad()
    def quality(self) -> Dict[str, Any]:
        """What a validation of the whole subset logs, by the criterion of the checkpoint: names and values."""
        device, logs = next(self.model.parameters()).device, []
        with constant_weights():
            for batch in progress(self._all(), "quality"):
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


def _moved(batch, device):
    return utils.move_to_cuda(batch, device) if torch.device(device).type == "cuda" else batch

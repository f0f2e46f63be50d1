"""The loss of models that skim tokens: ``--criterion skim_loss``, a task's loss and the price of a kept token."""

import math
from dataclasses import dataclass, field
from typing import Optional

import torch
from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.dataclass import FairseqDataclass
from fairseq.logging import metrics

from fairseq_adaptive.criterions.controller import Controller, warmed_up
from fairseq_adaptive.criterions.distillation import Teacher, Watched
from fairseq_adaptive.criterions.ponder_loss import build_task_criterion
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules import LayerStack, recording
from fairseq_adaptive.ranges import POSITIVE_SHARE, PRICE, TEMPERATURE, UPDATES, check_ranges, ranged
from fairseq_adaptive.report.skimming import decided, skim_macs


@dataclass
class SkimLossConfig(FairseqDataclass):
    task_criterion: str = field(
        default="sentence_prediction",
        metadata={"help": "the criterion of the task, by the name that --criterion has for it"},
    )
    task_criterion_args: str = field(
        default="{}", metadata={"help": "its other flags in JSON, such as '{\"report_mcc\": true}'"}
    )
    # the stock task sentence_prediction reads these two from its criterion's flags
    classification_head_name: str = field(
        default="sentence_classification_head", metadata={"help": "name of the classification head to use"}
    )
    regression_target: bool = field(default=False, metadata={"help": "the target is a number, not a class"})
    skim_factor: float = ranged(
        0.5, PRICE, "price of keeping all tokens in all layers (lambda of Guan et al., 2022)"
    )
    skim_warmup_updates: int = ranged(
        0, UPDATES, "updates in which that price rises from 0, or the target falls from 1"
    )
    target_flops: Optional[float] = ranged(
        None, POSITIVE_SHARE, "share of the dense model's FLOPs to steer to, predictors included; takes the place of "
        "--skim-factor, in either direction"
    )
    target_flops_gain: float = ranged(
        1.0, PRICE, "price of keeping all tokens when the share is 1 above the target"
    )
    target_flops_rate: float = ranged(
        0.01, PRICE, "by how much that price grows in an update while the share stays there"
    )
    distill_from: Optional[str] = field(
        default=None, metadata={"help": "checkpoint of a trained model, such as the dense one, whose output to learn"}
    )
    distill_weight: float = ranged(1.0, PRICE, "weight of the divergence from that output")
    distill_temperature: float = ranged(1.0, TEMPERATURE, "temperature of both outputs in it")


def _check(cfg):
    check_ranges(cfg, SkimLossConfig)
    if cfg.task_criterion in ("skim_loss", "ponder_loss"):
        raise UsageError(f"--task-criterion {cfg.task_criterion} is no criterion of a task: name one such as "
                         "sentence_prediction or masked_lm")


@register_criterion("skim_loss", dataclass=SkimLossConfig)
class SkimLoss(FairseqCriterion):
    """Loss of the task + lambda x mean over layers of the share of kept tokens (Guan et al., 2022, section 3.4).

    With a target the price follows the FLOPs of the decisions that evaluation would make; that is our own. The mean is
    over the tokens of a batch, padding never counts, and the logged ``loss`` is that of the task alone.

    Args:
        cfg: :class:`SkimLossConfig`
        task: keeps the state of the controller, so that a resumed training goes on exactly

    Raises:
        UsageError: for impossible flags, and at the first step for a model that does not skim
    """

    task_class = None

    def __init__(self, cfg, task, task_criterion):
        super().__init__(task)
        self.cfg, self.task_criterion = cfg, task_criterion
        excess = None if cfg.target_flops is None else lambda share: share - self._target()
        self.controller = Controller(task, "skimming", ("spent", "dense"), excess, cfg.target_flops_rate)
        self._update = 0
        self._teacher = Teacher(cfg.distill_from, task) if cfg.distill_from else None  # no module: it is not trained

    @classmethod
    def build_criterion(cls, cfg, task):
        _check(cfg)
        task_criterion = build_task_criterion(cfg, task)
        # fairseq asks the class, not the instance, how to reduce what it logs
        return type(cls.__name__, (cls,), {"task_class": type(task_criterion)})(cfg, task, task_criterion)

    def forward(self, model, sample, reduce=True):
        """Return loss (a sum, to be divided by the sample size), sample size and logging output."""
        stacks = {name: module for name, module in model.named_modules() if isinstance(module, LayerStack)}
        name, stack = next(((name, stack) for name, stack in stacks.items() if stack.router is not None), (None, None))
        if stack is None:
            raise UsageError("--criterion skim_loss needs a model that skims, such as --arch transkimmer_base without "
                             f"--no-skimming; or train with --criterion {self.cfg.task_criterion}")
        watched = Watched(model)
        with recording(model) as traces:
            loss, sample_size, logging_output = self.task_criterion(watched, sample, reduce)
        trace, layer = traces[name][0], stack[0]
        training = self.training and model.training
        alive = decided(trace) if training else [step.alive for step in trace.steps]
        macs = skim_macs(trace, layer.embed_dim, layer.fc1.out_features, alive)
        tokens = trace.tokens.sum().clamp_min(1)
        kept = torch.stack([step.kept.sum() for step in trace.steps])  # N
        self._update = stack.num_updates
        if training:
            self.controller.advance(self._update)
            self.controller.count(*macs)
        factor = self._factor()
        price = factor * kept.mean() / tokens
        if self._teacher is not None:
            distance = self._teacher.loss(watched, self.cfg.distill_temperature)
            logging_output["skim_distance"] = distance.detach() * sample_size
            price = price + self.cfg.distill_weight * distance
        if reduce:
            loss = loss + price * sample_size
        logging_output.update({"skim_loss": price.detach() * sample_size, "skim_samples": sample_size,
                               "skim_factor": factor * sample_size, "skim_tokens": tokens,
                               "skim_spent": macs[0], "skim_dense": macs[1]})
        for depth, count in enumerate(kept.detach(), start=1):
            logging_output[f"skim_kept_{depth}"] = count
        return loss, sample_size, logging_output

    def _target(self):
        return 1 - (1 - self.cfg.target_flops) * warmed_up(self._update, self.cfg.skim_warmup_updates)

    def _factor(self):
        if self.cfg.target_flops is None:
            return self.cfg.skim_factor * warmed_up(self._update, self.cfg.skim_warmup_updates)
        state = self.controller.state
        return self.cfg.target_flops_gain * state["excess"] + state["sum"]

    @classmethod
    def reduce_metrics(cls, logging_outputs) -> None:
        """Log what the task's criterion does; the price and its factor; the share of tokens kept, of all layers and of
        each; FLOPs and the speed-up that they promise."""
        cls.task_class.reduce_metrics(logging_outputs)
        totals = {}
        for output in logging_outputs:
            for name, value in output.items():
                if name.startswith("skim_"):
                    totals[name] = totals.get(name, 0.0) + float(value)
        samples, tokens, dense = (totals.get(f"skim_{name}", 0.0) for name in ("samples", "tokens", "dense"))
        if not samples or not tokens or not dense:
            return
        metrics.log_scalar("skim_loss", totals["skim_loss"] / samples / math.log(2), samples, round=4)
        metrics.log_scalar("skim_factor", totals["skim_factor"] / samples, samples, round=4)
        if "skim_distance" in totals:
            metrics.log_scalar("distance", totals["skim_distance"] / samples / math.log(2), samples, round=4)
        layers = [name for name in totals if name.startswith("skim_kept_")]
        metrics.log_scalar("kept", sum(totals[name] for name in layers) / len(layers) / tokens, tokens, round=4)
        for name in layers:
            metrics.log_scalar(name[len("skim_"):], totals[name] / tokens, tokens, round=4)
        metrics.log_scalar("flops", totals["skim_spent"] / dense, dense, round=4)
        metrics.log_derived("flops_speedup", lambda meters: round(1 / max(meters["flops"].avg, 1e-9), 2))

    @classmethod
    def logging_outputs_can_be_summed(cls) -> bool:
        return cls.task_class.logging_outputs_can_be_summed()

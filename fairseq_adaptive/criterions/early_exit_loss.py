"""The loss of a model that is to know its words at every depth: ``--criterion early_exit_loss``."""

import math
from dataclasses import dataclass, field
from typing import Optional

from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.dataclass import ChoiceEnum
from fairseq.logging import metrics

from fairseq_adaptive.criterions.exit_weights import CURRICULA, WEIGHTS, exit_depths, exit_weights
from fairseq_adaptive.criterions.task_criterion import WrappingConfig, build_task_criterion, check_model
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules import LayerStack
from fairseq_adaptive.modules.stack.every_state import every_state
from fairseq_adaptive.ranges import LAYERS, PRICE, Range, check_ranges, ranged

_UPDATES = Range(int, 1, 10**9)


@dataclass
class EarlyExitLossConfig(WrappingConfig):
    exit_weights: ChoiceEnum(tuple(WEIGHTS)) = field(
        default="linear",
        metadata={"help": "how the losses of depths 1, 2, ... n, ... weigh: 1, n, 1 + 2 + ... + n, or the root of n"},
    )
    exit_scale: float = ranged(1.0, PRICE, "factor of these weights at all depths but the last")
    exit_curriculum: ChoiceEnum(CURRICULA) = field(
        default="none",
        metadata={
            "help": "at which depths there is a loss: none, at all; rotational, at every R-th, one further in each update; "
            "gradual, at the last first and one by one at those before it. At the last there is always one"
        },
    )
    exit_every: int = ranged(4, LAYERS, "R, of --exit-curriculum rotational")
    exit_curriculum_updates: Optional[int] = ranged(
        None,
        _UPDATES,
        "after how many updates --exit-curriculum gradual has all depths (default: half of the training)",
    )


class ExitOutput:
    """Stands for a model in a criterion; its output is what a model that ended at some depth would have said.

    Args:
        model: a fairseq model
        states: after that depth, in the layout of its decoder's stack
    """

    def __init__(self, model, states):
        self._model, self._states = model, states

    def __getattr__(self, name):
        return getattr(self._model, name)

    def __call__(self, *args, features_only=False, **kwargs):
        decoder = self._model.decoder
        features = decoder.features_of(self._states)
        return features if features_only else decoder.output_layer(features), {"attn": [None], "inner_states": []}


def exits(model) -> LayerStack:
    """The stack of a model to whose depths its output layer can be put.

    Raises:
        UsageError: where there is none, or tokens are left out or halt in training
    """
    decoder = getattr(model, "decoder", None)
    found = [module for module in decoder.children() if isinstance(module, LayerStack)] if decoder is not None else []
    if not found or not hasattr(decoder, "features_of"):
        raise UsageError(
            "--criterion early_exit_loss needs a decoder whose depths its output layer can read: shared_transformer, "
            "shared_transformer_lm or par_transformer_xl"
        )
    stack, rule = found[0], found[0].halting
    if stack.router is not None or (rule is not None and (rule.priced or rule.weighs_depths or rule.halts_in_training)):
        raise UsageError(
            "--criterion early_exit_loss trains all depths on all tokens: leave --router and --halting out (or give "
            "saturation, margin or patience, which exit in inference alone)"
        )
    return stack


@register_criterion("early_exit_loss", dataclass=EarlyExitLossConfig)
class EarlyExitLoss(FairseqCriterion):
    """Sum over depths of weight x the task's loss of the output layer behind that depth (Elhoushi et al., *LayerSkip*,
    2024, Section 4.1.2; from secondary sources).

    One norm and one output layer serve all depths. The criterion of the task is called once a depth, so that one which
    needs no logits, ``fused_label_smoothed_cross_entropy`` or ``adaptive_cross_entropy``, never has those of several.

    Evaluation gives the loss of the last depth, that of the task; the log has ``exit_loss_n`` of every depth n beside it.
    In training ``loss`` is that of the last depth, too, and ``exit_loss`` the sum.

    Args:
        cfg: :class:`EarlyExitLossConfig`
        task: any
        task_criterion: the criterion of the task

    Raises:
        UsageError: for impossible flags; :meth:`check_model`, for a model that has no such depths
    """

    task_class = None

    def __init__(self, cfg, task, task_criterion):
        super().__init__(task)
        check_ranges(cfg, type(self))
        self.cfg, self.task_criterion = cfg, task_criterion
        self._updates = cfg.exit_curriculum_updates
        exit_weights(str(cfg.exit_weights), [0], 0)

    @classmethod
    def build_criterion(cls, cfg, task):
        if cls.task_class is not None:
            return cls(cfg=cfg, task=task)
        check_ranges(cfg, cls)
        task_criterion = build_task_criterion(cfg, task)
        # fairseq asks the class, not the instance, how to reduce what it logs
        return type(cls.__name__, (cls,), {"task_class": type(task_criterion)})(cfg, task, task_criterion)

    def check_model(self, model) -> None:
        """Called before training starts.

        Raises:
            UsageError: where this criterion, or that of the task, cannot train the model
        """
        exits(model)
        check_model(self.task_criterion, model)

    def prepare_targets(self, updates: Optional[int]):
        """Say how many updates the training has, None: no end; fairseq-train does.

        Raises:
            UsageError: where a curriculum has to know, and does not
        """
        if self._updates is None and str(self.cfg.exit_curriculum) == "gradual":
            if updates is None:
                raise UsageError(
                    "--exit-curriculum gradual goes over half of the training, which has no end: add --max-update or "
                    "--exit-curriculum-updates"
                )
            self._updates = max(1, updates // 2)

    def report_targets(self, updates: int):
        """Nothing is to be reached."""

    def depths(self, stack, training: bool):
        """The depths that have a loss now, counted from 0, and the weights of their losses."""
        cfg, depths, curriculum = self.cfg, len(stack), str(self.cfg.exit_curriculum) if training else "none"
        found = exit_depths(curriculum, depths, stack.num_updates, cfg.exit_every, self._updates or 0)
        return found, exit_weights(str(cfg.exit_weights), found, depths - 1, cfg.exit_scale)

    def forward(self, model, sample, reduce=True):
        """Return loss (a sum, to be divided by the sample size), sample size and logging output; with ``reduce=False`` the
        losses of tokens at the last depth."""
        stack, training = exits(model), self.training and model.training
        with every_state(stack) as states:
            loss, size, log = self.task_criterion(model, sample, reduce)
        if not reduce or len(states) < len(stack):  # a packed run, in which tokens have exited
            return loss, size, log
        found, weights = self.depths(stack, training)
        total = weights[-1] * loss
        for depth, weight in zip(found[:-1], weights[:-1]):
            each = self.task_criterion(ExitOutput(model, states[depth]), sample)[0]
            total = total + weight * each
            if not training:
                log[f"exit_loss_{depth + 1}"] = each.detach()
        log["exit_loss"], log["exit_size"] = total.detach(), size
        return (total if training else loss), size, log

    @classmethod
    def reduce_metrics(cls, logging_outputs) -> None:
        """Log what the task's criterion does, the sum of the losses and that of each depth, in base 2."""
        cls.task_class.reduce_metrics(logging_outputs)
        size = sum(float(each.get("exit_size", 0)) for each in logging_outputs)
        names = dict.fromkeys(name for each in logging_outputs for name in each if name.startswith("exit_loss"))
        for name in names if size else ():
            total = sum(float(each.get(name, 0)) for each in logging_outputs)
            metrics.log_scalar(name, total / size / math.log(2), size, round=3)

    @classmethod
    def logging_outputs_can_be_summed(cls) -> bool:
        return cls.task_class.logging_outputs_can_be_summed()

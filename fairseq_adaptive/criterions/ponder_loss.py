"""The loss of models in which tokens halt: ``--criterion ponder_loss``, a task's loss and the price of depth."""

import json
import logging
import math
from dataclasses import dataclass, field
from typing import Optional

from fairseq.criterions import (
    CRITERION_DATACLASS_REGISTRY,
    CRITERION_REGISTRY,
    FairseqCriterion,
    build_criterion,
    register_criterion,
)
from fairseq.dataclass import FairseqDataclass
from fairseq.logging import metrics
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fairseq_adaptive.criterions.controller import Controller, warmed_up
from fairseq_adaptive.criterions.expected_output import ExpectedOutput
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules import LayerStack, recording
from fairseq_adaptive.modules.policies.pondernet import prior_divergence, truncated_geometric
from fairseq_adaptive.ranges import POSITIVE_SHARE, PRICE, UPDATES, Range, check_ranges, ranged

logger = logging.getLogger(__name__)

PATIENCE = 100  # updates in a row with all tokens at one end before a warning


@dataclass
class PonderLossConfig(FairseqDataclass):
    task_criterion: str = field(
        default="cross_entropy", metadata={"help": "the criterion of the task, by the name that --criterion has for it"}
    )
    task_criterion_args: str = field(
        default="{}", metadata={"help": "its flags in JSON, such as '{\"label_smoothing\": 0.1}'"}
    )
    time_penalty: float = ranged(
        0.01, PRICE, "price of n + r, updates and remainder, of a token on average (Graves, 2016). The published "
        "penalties of ALBERT-ACT are for the sum over a sequence: multiply them by its length"
    )
    time_penalty_warmup_updates: int = ranged(
        0, UPDATES, "updates in which the penalty rises from 0, so that the model finds a use for depth"
    )
    target_depth: Optional[float] = ranged(
        None, Range(float, 1, 1000),
        "mean number of updates to steer to; takes the place of --time-penalty, in either direction"
    )
    target_depth_weight: float = ranged(0.1, PRICE, "weight of the steering when the depth is twice the target")
    target_depth_rate: float = ranged(
        0.01, PRICE, "by how much of that weight it grows in an update while the depth stays there"
    )
    prior_rate: float = ranged(
        0.2, POSITIVE_SHARE, "PonderNet: rate of the geometric prior; 1 over the depth to aim at"
    )
    kl_weight: float = ranged(0.01, PRICE, "PonderNet: weight of the divergence from the prior")
    # the stock task sentence_prediction reads these two from its criterion's flags
    classification_head_name: str = field(
        default="sentence_classification_head", metadata={"help": "name of the classification head to use"}
    )
    regression_target: bool = field(default=False, metadata={"help": "the labels are numbers"})


def build_task_criterion(cfg, task) -> FairseqCriterion:
    """Return the criterion that ``--task-criterion`` and ``--task-criterion-args`` name.

    Raises:
        UsageError: when there is none of that name, or it has no such flags
    """
    if cfg.task_criterion not in CRITERION_REGISTRY or cfg.task_criterion == "ponder_loss":
        raise UsageError(f"--task-criterion {cfg.task_criterion!r} is unknown: name one that --criterion takes, such "
                         "as cross_entropy, masked_lm or sentence_prediction")
    try:
        known = getattr(CRITERION_DATACLASS_REGISTRY.get(cfg.task_criterion), "__dataclass_fields__", {})
        shared = {name: cfg[name] for name in ("classification_head_name", "regression_target") if name in known}
        flags = OmegaConf.create({"_name": cfg.task_criterion, **shared, **json.loads(cfg.task_criterion_args)})
        config = CRITERION_DATACLASS_REGISTRY.get(cfg.task_criterion)
        if config is not None:
            check_ranges({name: each for name, each in flags.items() if isinstance(each, (int, float))}, config)
        if OmegaConf.is_config(cfg):  # criterions read some flags of the optimizer and of the program
            flags._set_parent(cfg._get_root())
        return build_criterion(flags, task)
    except (OmegaConfBaseException, RecursionError, TypeError, ValueError) as error:
        raise UsageError(f"--task-criterion-args {cfg.task_criterion_args!r} does not fit {cfg.task_criterion}: "
                         f"{' '.join(str(error).split())}") from error


@register_criterion("ponder_loss", dataclass=PonderLossConfig)
class PonderLoss(FairseqCriterion):
    """Loss of the task + time penalty x mean (n + r) (Graves, 2016), or PonderNet's expected loss + KL to a prior.

    With a target depth a controller pushes the halting unit's logits up or down instead; that is our own.

    The mean is over the tokens of a stack; several stacks (encoder and decoder) add up. The logged ``loss`` is that of
    the task alone. Padding never counts.

    Args:
        cfg: :class:`PonderLossConfig`
        task: keeps the state of the controller, so that a resumed training goes on exactly

    Raises:
        UsageError: for impossible flags, and at the first step for a model in which nothing halts
    """

    task_class = None

    def __init__(self, cfg, task, task_criterion):
        super().__init__(task)
        truncated_geometric(cfg.prior_rate, 1)
        self.cfg, self.task_criterion = cfg, task_criterion
        excess = None if cfg.target_depth is None else lambda depth: depth / cfg.target_depth - 1
        self.controller = Controller(task, "ponder", ("depths", "tokens"), excess, cfg.target_depth_rate)
        self._at_ends = [0, 0]

    @classmethod
    def build_criterion(cls, cfg, task):
        check_ranges(cfg, PonderLossConfig)
        task_criterion = build_task_criterion(cfg, task)
        # fairseq asks the class, not the instance, how to reduce what it logs
        return type(cls.__name__, (cls,), {"task_class": type(task_criterion)})(cfg, task, task_criterion)

    def forward(self, model, sample, reduce=True):
        """Return loss (a sum, to be divided by the sample size), sample size and logging output."""
        every_stack = {name: module for name, module in model.named_modules() if isinstance(module, LayerStack)}
        stacks = {name: stack for name, stack in every_stack.items() if stack.halting is not None}
        if not stacks:
            raise UsageError("--criterion ponder_loss needs a model in which tokens halt: add --halting act, or train "
                             f"with --criterion {self.cfg.task_criterion}")
        *_, last = every_stack.values()  # from which the model's output is made
        limit = max(map(len, stacks.values()))
        if (self.cfg.target_depth or 1) > limit:
            raise UsageError(f"--target-depth {self.cfg.target_depth} is impossible: the model has {limit} depths")
        training = self.training and model.training
        weighed = training and last.halting is not None and last.halting.weighs_depths
        if weighed and self.cfg.target_depth is not None:
            raise UsageError("--target-depth steers ACT's time penalty; with PonderNet, set --prior-rate to 1 over it")
        with recording(model) as traces:
            criterion_model = ExpectedOutput(model, last, traces) if weighed else model
            loss, sample_size, logging_output = self.task_criterion(criterion_model, sample, reduce)
        traces = {name: traces[name][0] for name in stacks}
        if training:
            self.controller.advance(last.num_updates)
            depths, tokens = (sum(each) for each in zip(*((t.updates.sum(), t.tokens.sum()) for t in traces.values())))
            self._warn_of_collapse(self.controller.count(depths, tokens), limit)
        price = self._price(traces.values(), last.num_updates)
        if reduce:
            loss = loss + price * sample_size
        logging_output["ponder_loss"] = price.detach() * sample_size
        logging_output["ponder_samples"] = sample_size
        for name, trace in traces.items():
            logging_output.update(_counts(name, trace, prefix=len(traces) > 1))
        return loss, sample_size, logging_output

    def _price(self, traces, update):
        price = 0.0
        for trace in traces:
            tokens = trace.tokens.sum().clamp_min(1)
            if trace.distribution is not None:
                prior = truncated_geometric(self.cfg.prior_rate, trace.limit).to(trace.distribution.device)
                divergence = prior_divergence(trace.distribution, prior)
                price = price + self.cfg.kl_weight * (divergence * trace.tokens).sum() / tokens
            elif trace.remainders is not None:
                price = price + self._act_price(trace, update) / tokens
            else:
                price = price + 0.0 * trace.updates.sum()
        return price

    def _act_price(self, trace, update):
        if self.cfg.target_depth is None:
            return self.cfg.time_penalty * warmed_up(update, self.cfg.time_penalty_warmup_updates) * trace.ponder_cost()
        state = self.controller.state  # n + r is flat where it has collapsed, the logits of p are not
        return self.cfg.target_depth_weight * (state["excess"] + state["sum"]) * trace.reluctance()

    def _warn_of_collapse(self, depth, limit):
        if limit == 1 or self.cfg.target_depth is not None:
            return
        for end, reached in enumerate((depth < 1.01, depth > limit - 0.01)):
            self._at_ends[end] = self._at_ends[end] + 1 if reached else 0
        if self._at_ends[0] == PATIENCE:
            logger.warning(
                "all tokens have halted at the first step for %d updates: there the halting unit gets no gradient any "
                "more. Start again with a lower --time-penalty (with PonderNet a lower --prior-rate) or with "
                "--time-penalty-warmup-updates", PATIENCE)
        if self._at_ends[1] == PATIENCE:
            logger.warning(
                "no token has halted before the last of %d steps for %d updates: raise --time-penalty (with PonderNet "
                "--prior-rate or --kl-weight), or set --target-depth", limit, PATIENCE)

    @classmethod
    def reduce_metrics(cls, logging_outputs) -> None:
        """Log what the task's criterion does, and the price of depth, depth, remainder, at_limit and the histogram."""
        cls.task_class.reduce_metrics(logging_outputs)
        totals = {}
        for output in logging_outputs:
            for name, value in output.items():
                if "ponder_" in name:
                    totals[name] = totals.get(name, 0.0) + float(value)
        samples = totals.pop("ponder_samples", 0.0)
        if samples:
            metrics.log_scalar("ponder_loss", totals["ponder_loss"] / samples / math.log(2), samples, round=4)
        for name in totals:
            if not name.endswith("ponder_tokens") or not totals[name]:
                continue
            prefix, tokens = name[: -len("ponder_tokens")], totals[name]
            for measure, digits in (("depth", 3), ("remainder", 4), ("at_limit", 4)):
                metrics.log_scalar(prefix + measure, totals[f"{prefix}ponder_{measure}"] / tokens, tokens, round=digits)
            start = f"{prefix}ponder_share_"
            for bin_name in (each for each in totals if each.startswith(start)):
                share = totals[bin_name] / tokens
                metrics.log_scalar(f"{prefix}depth_{bin_name[len(start):]}", share, tokens, round=4)

    @classmethod
    def logging_outputs_can_be_summed(cls) -> bool:
        return cls.task_class.logging_outputs_can_be_summed()


def _counts(name, trace, prefix):
    """Sums over tokens, with the stack's side in front where there are several."""
    prefix = f"{name.split('.')[-2]}_" if prefix else ""  # encoder_ or decoder_, also under a wrapper
    remainders = 0.0 if trace.remainders is None else (trace.remainders.detach() * trace.tokens).sum()
    counts = {
        "tokens": trace.tokens.sum(),
        "depth": trace.updates.sum(),
        "remainder": remainders,
        "at_limit": trace.at_limit(),
        **{f"share_{depth}": share for depth, share in enumerate(trace.histogram(), start=1)},
    }
    return {f"{prefix}ponder_{measure}": value for measure, value in counts.items()}

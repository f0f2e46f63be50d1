"""The loss of an architecture search: that of the language model, the entropy of the choices, and their compute."""

from dataclasses import dataclass, field

import torch
from fairseq import utils
from fairseq.criterions import register_criterion
from fairseq.dataclass import ChoiceEnum
from fairseq.logging import metrics

from fairseq_adaptive.criterions.adaptive_compute_loss import AdaptiveComputeLoss
from fairseq_adaptive.criterions.adaptive_cross_entropy import (
    AdaptiveCrossEntropy,
    AdaptiveCrossEntropyConfig,
    adaptive_losses,
)
from fairseq_adaptive.criterions.on_target import wanted
from fairseq_adaptive.modules.transformer_xl.block_costs import MEASURES
from fairseq_adaptive.modules.vocabulary.adaptive_softmax import cross_entropies
from fairseq_adaptive.ranges import PRICE, UPDATES, ranged


@dataclass
class ArchitectureEntropyLossConfig(AdaptiveCrossEntropyConfig):
    entropy_weight: float = ranged(0.0, PRICE, "weight of the mean entropy of a block's choice, which makes it choose")
    entropy_warmup_updates: int = ranged(
        0, UPDATES, "updates in which the weight of the entropy rises from 0, linearly"
    )
    target_compute: float = ranged(
        0.0,
        PRICE,
        "penalise a search whose expected compute is above this share of that of a Transformer-XL with as "
        "many blocks, attention and feed-forward in turn (0: no penalty)",
    )
    compute_weight: float = ranged(1.0, PRICE, "weight of the share above --target-compute")
    compute_measure: ChoiceEnum(MEASURES) = field(
        default="flops",
        metadata={"help": "compute of a block: its FLOPs, or the time it takes here, measured at the first step"},
    )


def language_model_losses(model, net_output, target, label_smoothing=0.0, reduce=False):
    """:func:`adaptive_losses`, and those of a softmax over the whole vocabulary where the model has one."""
    decoder = model.decoder
    if decoder.adaptive_softmax is not None:
        return adaptive_losses(model, net_output, target, label_smoothing, reduce)
    scored = target.ne(decoder.dictionary.pad())
    loss, nll = cross_entropies(net_output[0][scored], target[scored], label_smoothing)
    return (loss.sum(), nll.sum()) if reduce else (loss, nll)


class LanguageModelLoss(AdaptiveCrossEntropy):
    losses = staticmethod(language_model_losses)

    def check_model(self, model) -> None:
        """Both kinds of softmax are scored."""


@register_criterion("architecture_entropy_loss", dataclass=ArchitectureEntropyLossConfig)
class ArchitectureEntropyLoss(AdaptiveComputeLoss):
    """Language-model loss + entropy weight x entropy + compute weight x max(0, expected compute / target - 1).

    The paper (Mandava et al., 2020) publishes neither an entropy nor a compute term: both are this suite's. Each term is
    a mean, multiplied by the sample size, as fairseq divides the sum over workers by it. The entropy is the mean over
    blocks, in nats, at most ln 3; the expected compute is that of the blocks' probabilities, without noise.

    Logged besides those of ``adaptive_cross_entropy``: ``entropy`` (bits), ``compute`` (share of the Transformer-XL's),
    ``temperature``, and ``block_I_K``, the probability that block I is of kind K: a, f, or i for identity.
    """

    kinds, needs, task_class = ("search",), "architecture_entropy_loss is for --arch par_supernet;", LanguageModelLoss

    def __init__(self, task, cfg):
        super().__init__(cfg, task, LanguageModelLoss(task, cfg))

    @classmethod
    def build_criterion(cls, cfg, task):
        own = type(cls.__name__, (cls,), {"wanted": wanted(cfg)})
        return own(task, cfg)._follow()

    def steering(self):
        """The target is a bound: it is watched, and has a price above it."""
        return {"compute": {"value": self.cfg.target_compute, "steers": False}} if self.cfg.target_compute else {}

    def options(self, decision):
        return {"weight": self.cfg.entropy_weight, "warmup_updates": self.cfg.entropy_warmup_updates}

    def price(self, found, update):
        """Compute is not steered but has a price above its target, so that a search may end below."""
        terms, price = super().price(found, update)
        if self.cfg.target_compute:
            (each,) = found
            excess = each.policy.compute(each.trace) / self.cfg.target_compute - 1
            price = price + self.cfg.compute_weight * torch.relu(excess)
        return terms, price

    def report(self, log, found, terms, price, loss, size):
        (each,) = found
        log.update(loss=loss.detach(), updates=1, temperature=each.policy.temperature.detach().clone().float())
        log.update((name, value) for name, (value, _) in each.policy.measures(each.trace).items())

    @classmethod
    def reduce_metrics(cls, logging_outputs) -> None:
        LanguageModelLoss.reduce_metrics(logging_outputs)
        count = sum(log.get("updates", 0) for log in logging_outputs)
        if count:
            names = [name for name in logging_outputs[0] if name.startswith("block_")]
            for name in ["entropy", "compute", "temperature", *names]:
                value = sum(log.get(name, 0) for log in logging_outputs) / count
                metrics.log_scalar(name, utils.item(value), 1, round=3)
        start = f"{cls.mark}target_"
        cls.reduce_targets(
            {
                name: sum(float(log[name]) for log in logging_outputs)
                for name in logging_outputs[0]
                if name.startswith(start)
            }
            if logging_outputs
            else {}
        )

"""The loss of an architecture search: that of the language model, the entropy of the choices, and their compute."""

import math
from dataclasses import dataclass, field

import torch
from fairseq import utils
from fairseq.criterions import register_criterion
from fairseq.dataclass import ChoiceEnum
from fairseq.logging import metrics

from fairseq_adaptive.criterions.adaptive_cross_entropy import (
    AdaptiveCrossEntropy,
    AdaptiveCrossEntropyConfig,
    adaptive_losses,
)
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules.adaptive_softmax import cross_entropies
from fairseq_adaptive.modules.stochastic_block import KINDS
from fairseq_adaptive.ranges import PRICE, UPDATES, ranged
from fairseq_adaptive.report.block_costs import MEASURES


@dataclass
class ArchitectureEntropyLossConfig(AdaptiveCrossEntropyConfig):
    entropy_weight: float = ranged(0.0, PRICE, "weight of the mean entropy of a block's choice, which makes it choose")
    entropy_warmup_updates: int = ranged(
        0, UPDATES, "updates in which the weight of the entropy rises from 0, linearly"
    )
    target_compute: float = ranged(
        0.0, PRICE, "penalise a search whose expected compute is above this share of that of a Transformer-XL with as "
        "many blocks, attention and feed-forward in turn (0: no penalty)"
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


@register_criterion("architecture_entropy_loss", dataclass=ArchitectureEntropyLossConfig)
class ArchitectureEntropyLoss(AdaptiveCrossEntropy):
    """Language-model loss + entropy weight x entropy + compute weight x max(0, expected compute / target - 1).

    The paper (Mandava et al., 2020) publishes neither an entropy nor a compute term: both are this suite's. Each term is
    a mean, multiplied by the sample size, as fairseq divides the sum over workers by it. The entropy is the mean over
    blocks, in nats, at most ln 3; the expected compute is that of the blocks' probabilities, without noise.

    Logged besides those of ``adaptive_cross_entropy``: ``entropy`` (bits), ``compute`` (share of the Transformer-XL's),
    ``temperature``, and ``block_I_K``, the probability that block I is of kind K: a, f, or i for identity.
    """

    losses = staticmethod(language_model_losses)

    def __init__(self, task, cfg):
        super().__init__(task, cfg)
        self.cfg = cfg

    def forward(self, model, sample, reduce=True):
        decoder = getattr(model, "decoder", None)
        if not hasattr(decoder, "architecture"):
            raise UsageError("--criterion architecture_entropy_loss is for --arch par_supernet")
        decoder.measure_costs(self.cfg.compute_measure, sample["net_input"]["src_tokens"])
        net_output = model(**sample["net_input"])
        loss, sample_size, logging_output = self.compute(model, net_output, sample)
        probabilities = net_output[1]["block_probabilities"]  # [N, 3]
        entropy = -torch.xlogy(probabilities, probabilities).sum(-1).mean()
        compute = (probabilities * decoder.block_costs).sum() / (len(probabilities) / 2)
        warmup = self.cfg.entropy_warmup_updates
        weight = self.cfg.entropy_weight * (min(1.0, decoder.num_updates / warmup) if warmup else 1.0)
        penalty = weight * entropy
        if self.cfg.target_compute:
            penalty = penalty + self.cfg.compute_weight * torch.relu(compute / self.cfg.target_compute - 1)
        loss = loss + sample_size * penalty
        logging_output["loss"] = loss.detach()
        logging_output["updates"] = 1
        logging_output["entropy"] = entropy.detach() / math.log(2)
        logging_output["compute"] = compute.detach()
        logging_output["temperature"] = decoder.temperature.detach().clone().float()
        for index, row in enumerate(probabilities.detach()):
            for kind, probability in zip(KINDS, row, strict=True):
                logging_output[f"block_{index}_{kind}"] = probability
        return loss, sample_size, logging_output

    @classmethod
    def reduce_metrics(cls, logging_outputs) -> None:
        super().reduce_metrics(logging_outputs)
        count = sum(log.get("updates", 0) for log in logging_outputs)
        if count:
            names = [name for name in logging_outputs[0] if name.startswith("block_")]
            for name in ["entropy", "compute", "temperature", *names]:
                value = sum(log.get(name, 0) for log in logging_outputs) / count
                metrics.log_scalar(name, utils.item(value), 1, round=3)

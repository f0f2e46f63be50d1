"""Flags of ``--criterion adaptive_compute_loss``."""

from dataclasses import dataclass, field
from typing import Optional

from fairseq_adaptive.criterions.controller import TARGETS
from fairseq_adaptive.criterions.task_criterion import DistillationConfig
from fairseq_adaptive.ranges import POSITIVE_SHARE, ranged


@dataclass
class AdaptiveComputeLossConfig(DistillationConfig):
    prices: str = field(
        default="{}",
        metadata={
            "help": 'weights of the policies\' prices, in JSON: \'{"skimming": 0.3, "decoder_act": '
            '{"weight": 0.01, "warmup_updates": 1000}}\'. A key is a policy\'s name, with its side where both '
            "have one; or router, halting, reader or search for all of a kind. Further entries are options of "
            "that price, such as prior_rate of pondernet (default: each policy's own weight)"
        },
    )
    target_depth: Optional[float] = ranged(
        None, TARGETS["depth"].within, "mean number of updates of a token to steer the halting rules to"
    )
    target_flops: Optional[float] = ranged(
        None, TARGETS["flops"].within, "share of the dense model's FLOPs to steer the routers to"
    )
    target_tape: Optional[float] = ranged(
        None, TARGETS["tape"].within, "mean number of tape tokens of a sequence to steer the readers to"
    )
    target_compute: Optional[float] = ranged(
        None, TARGETS["compute"].within, "expected compute of a supernet to steer to, as a share of a Transformer-XL's"
    )
    compute: Optional[float] = ranged(
        None,
        POSITIVE_SHARE,
        "share of the multiply-adds of the dense model's layers to steer to, by whatever policies the model has; "
        "fairseq-adaptive dial sets it exactly afterwards",
    )
    target_args: str = field(
        default="{}",
        metadata={
            "help": 'how to steer, in JSON: \'{"depth": {"weight": 0.1, "gain": 1, "rate": 0.01, '
            '"warmup_updates": 0}}\' (these are the defaults; of flops and compute the weight is 1, and the rate is '
            "higher in trainings of fewer than 1,000 updates)"
        },
    )

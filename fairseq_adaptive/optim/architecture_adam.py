"""Adam for a model and, with values of their own, its architecture parameters: ``--optimizer architecture_adam``."""

import math
from dataclasses import dataclass

from fairseq.optim import register_optimizer
from fairseq.optim.adam import FairseqAdam, FairseqAdamConfig

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.ranges import POSITIVE_SHARE, PRICE, UPDATES, check_ranges, ranged


@dataclass
class ArchitectureAdamConfig(FairseqAdamConfig):
    architecture_lr: float = ranged(1e-2, PRICE, "learning rate of the architecture, constant")
    architecture_weight_decay: float = ranged(5e-4, PRICE, "weight decay of the architecture")
    architecture_warmup_updates: int = ranged(
        0, UPDATES, "updates in which the architecture is frozen and only weights are trained"
    )
    architecture_update_share: float = ranged(
        1.0, POSITIVE_SHARE, "share of the updates, spread evenly, that train the architecture, too"
    )


@register_optimizer("architecture_adam", dataclass=ArchitectureAdamConfig)
class ArchitectureAdam(FairseqAdam):
    """fairseq's Adam with a second group of parameters, those whose ``param_group`` is ``architecture``.

    Mandava et al. (2020), Section 4, freeze the architecture for 10,000 updates, then train it in a fifth of them with
    learning rate 0.01 and weight decay 0.0005; those are flags here. Where the architecture is left out of an update,
    its moments stay as they are.

    Raises:
        UsageError: when the model has no architecture parameters, or fairseq has melted them into one flat tensor
    """

    def __init__(self, cfg, params):
        params = list(params)
        architecture = [p for p in params if getattr(p, "param_group", None) == "architecture"]
        if not architecture:
            raise UsageError(
                "--optimizer architecture_adam finds no architecture parameters: train --arch par_supernet, and with "
                "--fp16 give --fp16-no-flatten-grads or --memory-efficient-fp16"
            )
        check_ranges(cfg, type(self))
        weights = [p for p in params if getattr(p, "param_group", None) != "architecture"]
        group = {
            "params": architecture,
            "lr": cfg.architecture_lr,
            "weight_decay": cfg.architecture_weight_decay,
            "architecture_updates": 0,
        }
        super().__init__(cfg, [{"params": weights}, group])

    @property
    def supports_flat_params(self):
        return False

    def set_lr(self, lr):
        """Set the learning rate of the weights; that of the architecture is constant."""
        for group in self.param_groups:
            if "architecture_updates" not in group:
                group["lr"] = lr

    def step(self, closure=None, scale=1.0, groups=None):
        for group in self.param_groups:
            if "architecture_updates" in group:
                group["architecture_updates"] += 1
                if not self._trains_architecture(group["architecture_updates"] - self.cfg.architecture_warmup_updates):
                    for parameter in group["params"]:
                        parameter.grad = None
        super().step(closure, scale, groups)

    def _trains_architecture(self, update):
        """Whether this update after the warm-up, counted from 1, is one of the share, spread evenly."""
        share = self.cfg.architecture_update_share
        return update > 0 and math.floor(update * share + 1e-9) > math.floor((update - 1) * share + 1e-9)

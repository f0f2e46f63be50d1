"""LAMB in plain PyTorch: ``--optimizer lamb_torch``. fairseq's own ``lamb`` needs NVIDIA's apex and a GPU."""

import ast
from dataclasses import dataclass, field
from typing import List

import torch
from fairseq.dataclass import FairseqDataclass
from fairseq.optim import FairseqOptimizer, register_optimizer
from omegaconf import II

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules.policies.base import upcast
from fairseq_adaptive.ranges import POSITIVE_SHARE, PRICE, check_ranges, ranged


class Lamb(torch.optim.Optimizer):
    """Layer-wise adaptation for large batches (You et al., 2020, Algorithm 2).

    Each matrix x takes a step of length lr ||x||: in the direction of Adam's bias-corrected step plus
    ``weight_decay`` x. As in the authors' training of BERT, biases and gains (tensors of one dimension) take Adam's
    step as it is and do not decay.

    Args:
        params: parameters or groups of them
        lr, betas, eps, weight_decay: as in Adam
    """

    supports_memory_efficient_fp16 = True
    supports_flat_params = False  # the length of a step is that of each tensor

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter, group):
        x, grad, state = upcast(parameter), upcast(parameter.grad), self.state[parameter]
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(x), exp_avg_sq=torch.zeros_like(x))
        state["step"] += 1
        (beta1, beta2), step = group["betas"], state["step"]
        mean = state["exp_avg"].lerp_(grad, 1 - beta1)
        square = state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        update = mean / (1 - beta1**step) / ((square / (1 - beta2**step)).sqrt() + group["eps"])
        if x.dim() > 1:
            update = update + group["weight_decay"] * x
            length, size = x.norm(), update.norm()
            update = update * torch.where((length > 0) & (size > 0), length / size, 1.0)
        parameter.copy_(x - group["lr"] * update)


@dataclass
class LambConfig(FairseqDataclass):
    lamb_betas: str = field(default="(0.9, 0.999)", metadata={"help": "betas of LAMB"})
    lamb_eps: float = ranged(1e-6, POSITIVE_SHARE, "epsilon of LAMB")
    weight_decay: float = ranged(0.0, PRICE, "weight decay of matrices")
    lr: List[float] = II("optimization.lr")


@register_optimizer("lamb_torch", dataclass=LambConfig)
class FairseqLamb(FairseqOptimizer):
    """:class:`Lamb` for ``fairseq-train``; with ``--fp16`` it needs ``--fp16-no-flatten-grads``.

    Raises:
        UsageError: for betas that are no two numbers in [0, 1)
    """

    def __init__(self, cfg, params):
        super().__init__(cfg)
        check_ranges(cfg, type(self))
        self._optimizer = Lamb(params, **self.optimizer_config)

    @property
    def optimizer_config(self):
        try:
            betas = tuple(float(beta) for beta in ast.literal_eval(str(self.cfg.lamb_betas)))
        except (SyntaxError, TypeError, ValueError):
            betas = ()
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise UsageError(
                f"--lamb-betas {self.cfg.lamb_betas!r} is impossible: give two numbers in [0, 1), such as "
                "'(0.9, 0.999)'"
            )
        return {"lr": self.cfg.lr[0], "betas": betas, "eps": self.cfg.lamb_eps, "weight_decay": self.cfg.weight_decay}

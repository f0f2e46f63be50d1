"""A patch of fairseq's mixed precision where there is no TPU and perhaps no GPU."""

import importlib.util
import logging
import os

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.ops import probe

VARIABLE = "FAIRSEQ_ADAPTIVE_BF16"
logger = logging.getLogger(__name__)


class _Autocast:
    """A criterion that computes in bfloat16 where that is safe; its backward pass follows what the forward pass did."""

    def __init__(self, criterion):
        self.criterion = criterion

    def __call__(self, model, sample, *args, **kwargs):
        # torch 2.13's fused attention takes twice as long as its plain one for the backward pass in bfloat16 on a CPU
        with torch.autocast("cpu", dtype=torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            return self.criterion(model, sample, *args, **kwargs)

    def __getattr__(self, name):
        return getattr(self.criterion, name)


def bf16_gains() -> bool:
    """Whether training in bfloat16 is faster on this CPU, where ``FAIRSEQ_ADAPTIVE_BF16=always`` does not say so.

    It must be faster by ``probe.NEAR`` in products, since casts take time, too.

    Raises:
        UsageError: for what the variable cannot be
    """
    asked = os.environ.get(VARIABLE) or "auto"
    if asked not in ("auto", "always"):
        raise UsageError(f"{VARIABLE}={asked} is unknown: choose one of auto, always")
    if asked == "always":
        return True
    figures = probe.figures(torch.get_num_threads())
    return figures.training("bf16") >= probe.NEAR * figures.training("fp32")


def fit_to_cpu(common) -> bool:
    """Change the flags of a training without a GPU, in place, to what trains there.

    Where bfloat16 gains nothing, the flags are those of autocast all the same, so that checkpoints have the same
    optimizer on any machine.

    Weights in half precision are refused in both of fairseq's forms: ``--fp16`` dies where it asks for the current GPU,
    and ``--memory-efficient-fp16``, six times slower than fp32, at the first gradient that overflows.

    Args:
        common: fairseq's group of flags of that name

    Returns:
        whether to compute in bfloat16

    Raises:
        UsageError: for ``--fp16``, and for variables that cannot be what they are
    """
    probe.requested()
    if common.fp16:
        raise UsageError("--fp16 and --memory-efficient-fp16 need a GPU; on a CPU train with --bf16")
    if common.bf16:
        common.bf16 = common.memory_efficient_bf16 = False
        common.amp = True
    if not common.amp:
        return False
    if bf16_gains():
        logger.info("no GPU: bfloat16 autocast, with weights and the optimizer's state in fp32")
        return True
    figures = probe.figures(torch.get_num_threads())
    logger.warning(
        "bf16 products run at %.0f GFLOP/s here and fp32 ones at %.0f, which is no gain: training in fp32; %s=always "
        "forces bf16",
        figures.training("bf16"),
        figures.training("fp32"),
        VARIABLE,
    )
    return False


def mix_precision():
    """``--bf16`` needs no TPU; on a CPU, ``--bf16`` and ``--amp`` are bfloat16 autocast if it gains; ``--fp16`` is refused.

    fairseq takes ``--bf16`` for a request of a TPU and dies without one, with or without a GPU. On a CPU its ``--amp``
    is fp32 (the autocast that it opens is CUDA's). Autocast keeps weights, their gradients and the optimiser's state in
    fp32, so that checkpoints are those of fp32 training. Nothing overflows in bfloat16 that does not in fp32, so that
    the loss is not scaled, and gradients that are not finite are what they are in fp32: an error (fairseq looks for a
    smaller scale and dies of there being none). Where the probe of products finds that bfloat16 gains nothing, training
    computes in fp32.

    fairseq's adaptive input writes what autocast made half precision into a tensor of single precision, and dies of it,
    on a GPU, too: it is computed without autocast.
    """
    from fairseq.modules import AdaptiveInput
    from fairseq.optim import AMPOptimizer
    from fairseq.tasks import FairseqTask
    from fairseq.trainer import Trainer

    stock_init, stock_step, stock_clip = Trainer.__init__, FairseqTask.train_step, AMPOptimizer.clip_grad_norm
    stock_embed = AdaptiveInput.forward

    def __init__(self, cfg, *args, **kwargs):
        common = cfg.common
        if common.tpu and importlib.util.find_spec("torch_xla") is None:
            common.tpu = False
        in_half = True
        if not common.tpu and (common.cpu or not torch.cuda.is_available()):
            in_half = fit_to_cpu(common)
        stock_init(self, cfg, *args, **kwargs)
        self.task.bf16_on_cpu = in_half

    def train_step(self, sample, model, criterion, optimizer, *args, **kwargs):
        on_cpu = (
            isinstance(optimizer, AMPOptimizer)
            and not optimizer.scaler.is_enabled()
            and getattr(self, "bf16_on_cpu", True)
        )
        return stock_step(
            self, sample, model, _Autocast(criterion) if on_cpu else criterion, optimizer, *args, **kwargs
        )

    def clip_grad_norm(self, *args, **kwargs):
        if self.scaler.is_enabled():
            return stock_clip(self, *args, **kwargs)
        norm = self.fp32_optimizer.clip_grad_norm(*args, **kwargs)
        if not torch.isfinite(norm).all():
            raise FloatingPointError("gradients are Nan/Inf")
        return norm

    def embed(self, input):
        with torch.autocast(input.device.type, enabled=False):
            return stock_embed(self, input)

    Trainer.__init__, FairseqTask.train_step, AMPOptimizer.clip_grad_norm = __init__, train_step, clip_grad_norm
    AdaptiveInput.forward = embed

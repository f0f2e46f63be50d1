"""A residual branch with its dropout, the sum with its input, and the layer norm of the sum in one pass."""

from typing import Tuple

from torch import Tensor

from fairseq_adaptive.ops.registry import Op

OP = Op(
    "residual_norm",
    {
        "triton": f"{__name__}.triton:residual_norm",
        "apex": f"{__name__}.apex:residual_norm",
        # the one variant in chunks that was tried on a CPU was slower at most sizes: docs/performance.md
        "torch": f"{__name__}.naive:residual_norm",
    },
)


def residual_norm(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, dropout: float = 0.0
) -> Tuple[Tensor, Tensor]:
    """Return (total, normalized) as ``naive.py`` defines them; which elements dropout leaves out, torch's seed decides.

    Args:
        x, branch: ... x C
        weight, bias: C
        eps: added to the variance
        dropout: probability
    """
    return OP.implementation(x, x.dtype)(x, branch, weight, bias, eps, dropout)

"""The layer norm by NVIDIA apex; dropout and sum by torch."""

from apex.normalization.fused_layer_norm import fused_layer_norm_affine
from torch.nn.functional import dropout as drop


def residual_norm(x, branch, weight, bias, eps=1e-5, dropout=0.0):
    """As :func:`fairseq_adaptive.ops.residual_norm.naive.residual_norm`."""
    total = x + drop(branch, dropout)
    return total, fused_layer_norm_affine(total, weight, bias, weight.shape, eps)

"""How the branches of sublayers are added to their input, and normalized."""

from typing import Callable, Optional, Sequence, Tuple

from fairseq.modules import FairseqDropout, layer_norm
from torch import Tensor, nn

from fairseq_adaptive.modules.layers.dropout import FastDropout
from fairseq_adaptive.modules.layers.known import is_plain
from fairseq_adaptive.ops.residual_norm import OP, residual_norm

FUSABLE = (nn.LayerNorm, getattr(layer_norm, "FusedLayerNorm", nn.LayerNorm))  # the second is apex's, where there


def add_and_norm(
    x: Tensor, branch: Tensor, dropout: FairseqDropout, norm: Optional[nn.Module]
) -> Tuple[Tensor, Tensor]:
    """Return ``x + dropout(branch)`` and its norm, or the sum twice where there is no norm; all are ... x C.

    One kernel where there is one that can run. Elsewhere the modules do it, whose dropout has random numbers of its own
    on a CPU (:mod:`fairseq_adaptive.modules.layers.dropout`).
    """
    if (
        norm is not None
        and OP.choose(x.device.type, x.dtype)[0] != "torch"
        and is_plain(norm, FUSABLE)
        and is_plain(dropout, (FairseqDropout, FastDropout))
    ):
        active = dropout.training or dropout.apply_during_inference
        return residual_norm(x, branch, norm.weight, norm.bias, norm.eps, dropout.p if active else 0.0)
    total = x + dropout(branch)
    return total, total if norm is None else norm(total)


def run_sublayers(
    layer: nn.Module,
    x: Tensor,
    sublayers: Sequence[Tuple[nn.Module, Callable]],
    depth: int,
    residual: Optional[Callable],
    padding_mask: Optional[Tensor],
    skip_weight: Optional[Tensor] = None,
) -> Tensor:
    """Post-LN ``norm(x + f(x))`` or pre-LN ``x + f(norm(x))``, sublayer by sublayer, with dropout on the branches.

    Args:
        layer: has ``dropout_module`` and ``normalize_before``
        x: ... x C
        sublayers: (norm, f) of each
        depth: at which depth the layer runs
        residual: ``residual(branch, x, depth, sublayer, padding_mask)`` in the place of ``branch + x``, or None
        padding_mask: B x T, for ``residual``
        skip_weight: C, scales x in the sum of the last sublayer

    Returns:
        ... x C
    """
    norms = [norm for norm, _ in sublayers]
    following = [*norms[1:], None] if layer.normalize_before else norms  # the norm that reads the sum
    y = norms[0](x) if layer.normalize_before else x
    for index, ((_, function), norm) in enumerate(zip(sublayers, following)):
        branch = function(y)
        if skip_weight is not None and index == len(sublayers) - 1:
            x = skip_weight * x
        if residual is None:
            x, y = add_and_norm(x, branch, layer.dropout_module, norm)
        else:
            x = residual(layer.dropout_module(branch), x, depth, index, padding_mask)
            y = x if norm is None else norm(x)
        if not layer.normalize_before:
            x = y
    return x

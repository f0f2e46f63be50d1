"""Label-smoothed cross-entropy of an output layer, or of an adaptive softmax, in chunks of hidden states."""

from typing import Optional, Sequence, Tuple

import torch
from torch import Tensor

from fairseq_adaptive.ops.cross_entropy.chunked import ChunkedCrossEntropy
from fairseq_adaptive.ops.cross_entropy.clustered import ClusteredCrossEntropy
from fairseq_adaptive.ops.registry import Op

OP = Op("label_smoothed_cross_entropy", {"triton": f"{__name__}.triton:rows", "torch": f"{__name__}.rows:rows"})


def label_smoothed_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    label_smoothing: float = 0.0,
    bias: Optional[Tensor] = None,
    count: bool = False,
) -> Tuple[Tensor, Tensor, Tensor]:
    """Return (loss, nll, right) as ``naive.py`` defines them; only the loss has a gradient, for one backward pass.

    Under autocast, matrices are multiplied in its precision.

    Args:
        hidden: ``[N, C]``
        weight: ``[V, C]``
        target: ``[N]``, each below V
        label_smoothing: e
        bias: ``[V]`` or None
        count: whether to count the rows whose most likely word is the target; without, ``right`` is 0
    """
    settings = _settings(hidden, weight, bias)
    with torch.autocast(hidden.device.type, enabled=False):
        return ChunkedCrossEntropy.apply(hidden, weight, bias, target, label_smoothing, *settings, count)


def adaptive_cross_entropy(
    hiddens: Sequence[Tensor],
    targets: Sequence[Tensor],
    tables: Sequence[Tensor],
    sizes: Sequence[int],
    bias: Tensor,
    cluster_weight: Tensor,
    cluster_bias: Tensor,
    label_smoothing: float = 0.0,
) -> Tuple[Tensor, Tensor]:
    """Return (loss, nll), summed over rows and over head and tails of an adaptive softmax; only the loss has a gradient.

    Args:
        hiddens: of the head ``[N, C]``, and for each of K tails those whose word is in it ``[n, C']``
        targets: words of the head, the tails behind those ``[N]``; for each tail the word's place in it ``[n]``
        tables: the embeddings ``[V, C]`` of all clusters, or those of each
        sizes: words of each cluster, the most frequent first
        bias: ``[V]``
        cluster_weight, cluster_bias: ``[K, C]`` and ``[K]``, which stand for the tails in the head
        label_smoothing: within each softmax
    """
    settings = _settings(hiddens[0], *tables)
    with torch.autocast(hiddens[0].device.type, enabled=False):
        return ClusteredCrossEntropy.apply(
            targets, sizes, label_smoothing, *settings, bias, cluster_weight, cluster_bias, *hiddens, *tables
        )


def _settings(hidden, *others):
    """What computes rows, in which precision, and whether a gradient is wanted."""
    dtype, device = hidden.dtype, hidden.device.type
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    gradient = torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in (hidden, *others))
    return OP.implementation(hidden, dtype), dtype, gradient

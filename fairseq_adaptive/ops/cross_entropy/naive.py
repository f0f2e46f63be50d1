"""The definition of the label-smoothed cross-entropy of an output layer."""

from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor


def label_smoothed_cross_entropy(
    hidden: Tensor, weight: Tensor, target: Tensor, label_smoothing: float = 0.0, bias: Optional[Tensor] = None
) -> Tuple[Tensor, Tensor, Tensor]:
    """Return (loss, nll, right), each summed over N rows; the first two at least float32, the last is a count.

    The smoothed target has probability ``1 - label_smoothing`` on the right word and the rest spread evenly over the
    other ``V - 1`` (Szegedy et al., 2016, as in fairseq's ``label_smoothed_nll_loss``).

    Args:
        hidden: ``[N, C]``
        weight: ``[V, C]``, V at least 2 where labels are smoothed
        target: ``[N]``
        label_smoothing: e
        bias: ``[V]`` or None
    """
    logits = F.linear(hidden, weight, bias)  # [N, V]
    log_probs = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    nll = -log_probs.gather(-1, target[:, None]).sum()
    each = label_smoothing / max(weight.size(0) - 1, 1)
    loss = (1 - label_smoothing - each) * nll - each * log_probs.sum()
    return loss, nll.detach(), logits.argmax(-1).eq(target).sum()

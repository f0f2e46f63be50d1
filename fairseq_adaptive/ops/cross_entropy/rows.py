"""Loss and gradient of rows of logits, on torch's own kernels."""

from typing import Optional, Tuple

import torch
from torch import Tensor


def rows(
    logits: Tensor, target: Tensor, label_smoothing: float, gradient: bool
) -> Tuple[Tensor, Tensor, Optional[Tensor]]:
    """Return loss ``[n]``, nll ``[n]``, and the gradient of the summed loss or None; ``logits`` may be overwritten.

    With p = softmax(logits) and e = label_smoothing / (V - 1)::

        loss = (1 - label_smoothing - e) * nll + e * sum of all -log p
        d loss / d logit = p - e - (1 - label_smoothing - e) * [right word]

    Args:
        logits: ``[n, V]``
        target: ``[n]``
    """
    exact = torch.promote_types(logits.dtype, torch.float32)
    words = logits.size(-1)
    each = label_smoothing / max(words - 1, 1)
    highest, right = logits.amax(-1).to(exact), logits.gather(-1, target[:, None]).squeeze(-1).to(exact)  # [n]
    total = logits.sum(-1, dtype=exact) if label_smoothing else 0.0
    probs = torch.softmax(logits, -1, dtype=exact)
    # the highest probability is at least 1 / V: its logarithm is safe where that of the right word may not be
    normaliser = highest - probs.amax(-1).log()
    nll = normaliser - right
    loss = (1 - label_smoothing - each) * nll + each * (words * normaliser - total)
    if not gradient:
        return loss, nll, None
    probs.scatter_add_(-1, target[:, None], probs.new_full((len(target), 1), each + label_smoothing - 1))
    return loss, nll, (probs.sub_(each) if label_smoothing else probs).to(logits.dtype)

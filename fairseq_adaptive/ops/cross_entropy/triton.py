"""Loss and gradient of rows of logits in one kernel: a row is read twice and its gradient takes its place."""

from typing import Optional, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _kernel(logits, target, loss, nll, words, right_share, other_share, gradient: tl.constexpr, block: tl.constexpr):
    """One program a row of ``words`` logits; the smoothed target has ``other_share`` on each word, and more on one."""
    row = tl.program_id(0)
    logits += row.to(tl.int64) * words
    word = tl.load(target + row)
    known = (word >= 0) & (word < words)  # nothing else stops a kernel from reading there
    score = tl.load(logits + word, mask=known, other=float("nan")).to(tl.float32)
    highest, total_exp, total = -float("inf"), 0.0, 0.0
    for start in range(0, words, block):
        column = start + tl.arange(0, block)
        inside = column < words
        x = tl.load(logits + column, mask=inside, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(highest, tl.max(x, 0))
        total_exp = total_exp * tl.exp(highest - higher) + tl.sum(tl.exp(x - higher), 0)
        total += tl.sum(tl.where(inside, x, 0.0), 0)
        highest = higher
    normaliser = highest + tl.log(total_exp)
    tl.store(nll + row, normaliser - score)
    tl.store(loss + row, right_share * (normaliser - score) + other_share * (words * normaliser - total))
    if gradient:
        for start in range(0, words, block):
            column = start + tl.arange(0, block)
            inside = column < words
            x = tl.load(logits + column, mask=inside, other=-float("inf")).to(tl.float32)
            grad = tl.exp(x - normaliser) - other_share - tl.where(column == word, right_share, 0.0)
            tl.store(logits + column, grad.to(logits.dtype.element_ty), mask=inside)


def rows(
    logits: Tensor, target: Tensor, label_smoothing: float, gradient: bool
) -> Tuple[Tensor, Tensor, Optional[Tensor]]:
    """As :func:`fairseq_adaptive.ops.cross_entropy.rows.rows`, for contiguous ``logits`` of at most 32 bits."""
    count, words = logits.shape
    loss, nll = (torch.empty(count, dtype=torch.float32, device=logits.device) for _ in range(2))
    each = label_smoothing / max(words - 1, 1)
    block = min(triton.next_power_of_2(words), 4096)
    _kernel[(count,)](
        logits, target, loss, nll, words, 1 - label_smoothing - each, each, gradient=gradient, block=block, num_warps=8
    )
    return loss, nll, logits if gradient else None

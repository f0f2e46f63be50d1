"""What kernels.py measures: for every operation its inputs, its definition, and the least that it must read and write.

A new operation adds a function and a line in ``CASES``.
"""

import functools
from dataclasses import dataclass, field
from typing import Callable, Dict, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_adaptive.ops import cross_entropy as loss
from fairseq_adaptive.ops import halting_update as halting
from fairseq_adaptive.ops import relative_attention as relative
from fairseq_adaptive.ops import residual_norm as residual
from fairseq_adaptive.ops import skim_attention as skimming
from fairseq_adaptive.ops.cross_entropy import naive as naive_loss
from fairseq_adaptive.ops.cross_entropy.chunked import CHUNK
from fairseq_adaptive.ops.halting_update import naive as naive_halting
from fairseq_adaptive.ops.relative_attention import naive as naive_relative
from fairseq_adaptive.ops.relative_attention import queries as relative_queries
from fairseq_adaptive.ops.residual_norm import naive as naive_residual
from fairseq_adaptive.ops.skim_attention import naive as naive_skimming


@dataclass
class Case:
    """One operation at one size.

    Attributes:
        shape: in words
        naive, fused: take ``leaves`` and ``others`` by name and return tensors, some of which may have a gradient
        leaves: inputs that get a gradient
        others: the other arguments
        forward, both: bytes that must be moved, or arithmetic operations, in a forward pass and with the backward pass,
            which there is where there are leaves
        arithmetic: whether these are operations
        library: what torch has for the same, or nearly
    """

    shape: str
    naive: Callable
    fused: Callable
    leaves: Dict[str, Tensor]
    forward: int
    both: int
    others: Dict = field(default_factory=dict)
    arithmetic: bool = False
    library: Optional[Callable] = None


def label_smoothed_cross_entropy(dtype, rows, words, width, smoothing):
    leaves = {"hidden": torch.randn(rows, width, dtype=dtype), "weight": torch.randn(words, width).mul(0.02).to(dtype)}
    others = {"target": torch.randint(words, (rows,)), "label_smoothing": smoothing}
    product = 2 * rows * words * width  # that of the logits; a backward pass has two more

    def library(hidden, weight, target, label_smoothing):
        """The loss alone. With smoothed labels torch 2.13 has no chunks."""
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=CHUNK)
        return [F.linear_cross_entropy(hidden, weight, target, reduction="sum", options=options)]

    return Case(
        f"{rows} x {width}, {words} words, smoothing {smoothing}",
        naive_loss.label_smoothed_cross_entropy,
        functools.partial(loss.label_smoothed_cross_entropy, count=True),
        leaves,
        product,
        3 * product,
        others,
        arithmetic=True,
        library=None if smoothing or not hasattr(F, "linear_cross_entropy") else library,
    )


def halting_update(dtype, rows, width, universal):
    """With an output of its own, in float32, as in the Universal Transformer, or without."""
    leaves = {
        "before": torch.randn(rows, width, dtype=dtype),
        "after": torch.randn(rows, width, dtype=dtype),
        "weight": torch.randn(width).mul(0.02).to(dtype),
        "bias": torch.zeros(1, dtype=dtype),
        "halting": torch.rand(rows).mul(0.8),
        "remainders": torch.zeros(rows),
    }
    if universal:
        leaves["output"] = torch.randn(rows, width)
    others = {"running": torch.rand(rows) < 0.8, "threshold": 0.99}
    state, output = rows * width * dtype.itemsize, 4 * rows * width * universal
    # two states in, one out; then a gradient and the states in, two gradients out
    return Case(
        f"{rows} x {width}{', UT' if universal else ''}",
        naive_halting.halting_update,
        halting.halting_update,
        leaves,
        3 * state + 2 * output,
        8 * state + 5 * output,
        others,
    )


def residual_norm(dtype, rows, width, dropout=0.1):
    leaves = {name: torch.randn(rows, width, dtype=dtype) for name in ("x", "branch")}
    leaves.update(weight=torch.ones(width, dtype=dtype), bias=torch.zeros(width, dtype=dtype))
    states = rows * width * dtype.itemsize
    # two in and two out; then two gradients and the sum in, two gradients out
    return Case(
        f"{rows} x {width}, dropout {dropout}",
        naive_residual.residual_norm,
        residual.residual_norm,
        leaves,
        4 * states,
        9 * states,
        {"dropout": dropout},
    )


def skim_attention(dtype, sequences, length, heads, width):
    """All sequences are equally long, and two thirds of the tokens are kept."""
    rows = sequences * length
    leaves = {name: torch.randn(rows, heads, width, dtype=dtype) for name in ("query", "key", "value")}
    leaves["kept"] = (torch.rand(rows) < 2 / 3).float()
    lengths = torch.full((sequences,), length)

    def naive(**inputs):
        return [naive_skimming.skim_attention(**inputs, lengths=[length] * sequences)]

    def fused(**inputs):
        return [skimming.skim_attention(**inputs, sequences=skimming.Sequences(lengths))]

    product = 2 * sequences * heads * length**2 * width  # two of them, then one for each of four gradients
    return Case(
        f"{sequences} x {length}, {heads} heads of {width}",
        naive,
        fused,
        leaves,
        2 * product,
        6 * product,
        arithmetic=True,
    )


def relative_attention(dtype, sequences, length, heads, width):
    """A segment and a memory of the same length."""
    keys = (heads, sequences, 2 * length, width)
    shapes = {
        "queries": (heads, sequences, length, width),
        "keys": keys,
        "values": keys,
        "distances": (heads, 2 * length + 1, width),
    }
    leaves = {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}
    leaves.update({name: torch.randn(heads, width, dtype=dtype) for name in ("content_bias", "position_bias")})

    def listed(function):
        return lambda **inputs: [function(**inputs)]

    product = 2 * sequences * heads * length * 2 * length * width  # three of them, then one for each of six gradients
    return Case(
        f"{sequences} x {length}, memory {length}, {heads} heads of {width}",
        listed(naive_relative.relative_attention),
        listed(relative.relative_attention),
        leaves,
        3 * product,
        9 * product,
        arithmetic=True,
    )


def relative_attention_queries(dtype, sequences, length, heads, width, share):
    """A share of the positions of a segment, over the segment and a memory of the same length; in inference."""
    queried = max(1, int(share * length))
    place = torch.stack([torch.randperm(length)[:queried].sort().values for _ in range(sequences)]) + length
    shapes = {
        "queries": (heads, sequences, queried, width),
        "keys": (heads, sequences, 2 * length, width),
        "values": (heads, sequences, 2 * length, width),
        "distances": (heads, 2 * length + 1, width),
        "content_bias": (heads, width),
        "position_bias": (heads, width),
    }
    others = {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}

    def listed(function):
        return lambda **inputs: [function(**inputs)]

    product = 2 * sequences * heads * queried * 2 * length * width
    return Case(
        f"{queried} of {sequences} x {length}, memory {length}, {heads} heads of {width}",
        listed(naive_relative.query_attention),
        listed(relative_queries.attend),
        {},
        3 * product,
        0,
        {**others, "place": place},
        arithmetic=True,
    )


# name of the operation: function, sizes on a GPU, on a CPU, and to try the script
CASES: Dict[str, Tuple] = {
    "label_smoothed_cross_entropy": (
        label_smoothed_cross_entropy,
        [(8192, 32768, 512, 0.1), (8192, 32768, 512, 0.0)],
        [(1024, 9720, 128, 0.1), (1024, 9720, 128, 0.0)],
        [(9, 20, 8, 0.0)],
    ),
    "halting_update": (
        halting_update,
        [(8192, 768, False), (65536, 1024, False), (65536, 1024, True)],
        [(4096, 512, False), (4096, 512, True)],
        [(9, 8, False), (9, 8, True)],
    ),
    "residual_norm": (residual_norm, [(8192, 512), (65536, 1024)], [(4096, 512)], [(9, 8)]),
    "skim_attention": (skim_attention, [(64, 128, 12, 64), (16, 512, 12, 64)], [(16, 128, 12, 32)], [(2, 5, 2, 4)]),
    "relative_attention": (
        relative_attention,
        [(60, 150, 10, 41), (22, 512, 8, 64)],
        [(8, 150, 8, 64)],
        [(2, 5, 2, 4)],
    ),
    "relative_attention_queries": (
        relative_attention_queries,
        [(60, 150, 10, 41, 0.3), (22, 512, 8, 64, 0.3)],
        [(8, 150, 8, 64, 0.3)],
        [(2, 5, 2, 4, 0.5)],
    ),
}

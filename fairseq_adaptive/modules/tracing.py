"""Calls that are traced: what they compute goes into a graph, for all tokens that it will ever get."""

import torch

from fairseq_adaptive.errors import UsageError


def is_traced() -> bool:
    """Whether this call is traced or exported: by ``torch.jit.trace``, ``torch.export`` or ``torch.onnx.export``."""
    return torch.jit.is_tracing() or torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export()


def refuse_tracing() -> None:
    """
    Raises:
        UsageError: while a call is traced: what is computed depends on the tokens, and a graph would have for all what those
            of the example need
    """
    if is_traced():
        raise UsageError(
            "routers, halting rules and readers choose what is computed, which a traced graph cannot: export the dense form, "
            "exportable() of a model of fairseq_adaptive.hub, or fairseq-adaptive export --to onnx"
        )

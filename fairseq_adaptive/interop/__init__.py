"""Reading and writing other people's checkpoints."""

import fairseq_adaptive.plugin  # noqa: F401  loads safely, knows our architectures
from fairseq_adaptive.interop.averaging import average_checkpoints, last_checkpoints
from fairseq_adaptive.interop.checkpoint import load_checkpoint, require_new, save_checkpoint
from fairseq_adaptive.interop.to_ctranslate2 import convert_to_ctranslate2
from fairseq_adaptive.interop.unrolling import unroll_checkpoint, write_plain

__all__ = [
    "average_checkpoints",
    "convert_to_ctranslate2",
    "last_checkpoints",
    "load_checkpoint",
    "require_new",
    "save_checkpoint",
    "unroll_checkpoint",
    "write_plain",
]

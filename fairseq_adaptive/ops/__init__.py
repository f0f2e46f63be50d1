"""Fused operations: one folder each, where ``naive.py`` is the definition; modules and criterions import them here."""

import fairseq_adaptive.ops.decoder_step  # noqa: F401  registers it
import fairseq_adaptive.ops.encoder_layer  # noqa: F401  registers it
import fairseq_adaptive.ops.flops  # noqa: F401  registers what torch does not count
import fairseq_adaptive.ops.int8_linear  # noqa: F401  registers it
import fairseq_adaptive.ops.relative_attention  # noqa: F401  registers it
import fairseq_adaptive.ops.residual_norm  # noqa: F401  registers it
from fairseq_adaptive.ops.cross_entropy import adaptive_cross_entropy, label_smoothed_cross_entropy
from fairseq_adaptive.ops.halting_update import Update
from fairseq_adaptive.ops.registry import OPS, Op
from fairseq_adaptive.ops.skim_attention import Sequences  # functions that have the name of their folder stay in it

__all__ = ["OPS", "Op", "Sequences", "Update", "adaptive_cross_entropy", "label_smoothed_cross_entropy"]

"""Fused operations: one folder each, where ``naive.py`` is the definition; modules and criterions import them here."""

from fairseq_adaptive.ops.cross_entropy import adaptive_cross_entropy, label_smoothed_cross_entropy
from fairseq_adaptive.ops.registry import OPS, Op
from fairseq_adaptive.ops.relative_attention import relative_attention

__all__ = ["OPS", "Op", "adaptive_cross_entropy", "label_smoothed_cross_entropy", "relative_attention"]

"""Adaptive-compute Transformers for fairseq: what ``--user-dir fairseq_adaptive`` imports."""

__version__ = "0.1.0"

from fairseq_adaptive import compat, errors

compat.apply()
errors.report_usage_errors()

import fairseq_adaptive.models  # noqa: E402,F401  registers models and architectures; needs the mends of compat

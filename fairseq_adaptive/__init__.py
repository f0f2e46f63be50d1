"""Adaptive-compute Transformers for fairseq: what ``--user-dir fairseq_adaptive`` imports."""

__version__ = "0.1.0"

from fairseq_adaptive import compat, errors

errors.report_usage_errors()
if compat.apply():  # else fairseq cannot be imported, and fairseq_adaptive.info says why
    import fairseq_adaptive.criterions  # noqa: F401
    import fairseq_adaptive.models  # noqa: F401  registers models and architectures; needs the mends
    import fairseq_adaptive.optim  # noqa: F401
    import fairseq_adaptive.tasks  # noqa: F401

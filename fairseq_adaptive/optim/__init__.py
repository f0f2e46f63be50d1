"""fairseq optimizers."""

from fairseq_adaptive.optim import architecture_adam  # noqa: F401

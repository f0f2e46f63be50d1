"""fairseq optimizers."""

from fairseq_adaptive.optim import architecture_adam, lamb  # noqa: F401

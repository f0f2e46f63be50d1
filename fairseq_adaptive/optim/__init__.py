"""fairseq optimizers."""

import fairseq_adaptive.plugin  # noqa: F401  patches fairseq before a class of it is used
from fairseq_adaptive.optim import architecture_adam, lamb  # noqa: F401

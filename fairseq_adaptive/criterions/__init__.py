"""fairseq criterions, one file each."""

import fairseq_adaptive.plugin  # noqa: F401  patches fairseq before a class of it is used
from fairseq_adaptive.criterions import (  # noqa: F401  registers criterions
    adaptive_compute_loss,
    adaptive_cross_entropy,
    architecture_entropy_loss,
    early_exit_loss,
    fused_label_smoothed_cross_entropy,
    masked_lm_sop,
    ponder_loss,
    skim_loss,
    span_prediction,
    tape_ponder_loss,
)

"""What stock fairseq tasks do not cover; fairseq's --user-dir imports every file here, too."""

import fairseq_adaptive.plugin  # noqa: F401  patches fairseq before a class of it is used
from fairseq_adaptive.tasks import (  # noqa: F401
    image_classification,
    masked_lm_sop,
    parity,
    question_answering,
    segmented_language_modeling,
)

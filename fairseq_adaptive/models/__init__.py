"""fairseq models: configuration and wiring, one file a family."""

import fairseq_adaptive.plugin  # noqa: F401  patches fairseq before a class of it is used
from fairseq_adaptive.models import (  # noqa: F401
    adatape,
    adatape_parity,
    albert_act,
    adatape_vit,
    par_supernet,
    par_transformer_xl,
    shared_transformer,
    shared_transformer_lm,
    transkimmer,
)

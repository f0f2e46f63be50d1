"""fairseq models: configuration and wiring, one file a family."""

from fairseq_adaptive.models import shared_transformer, shared_transformer_lm  # noqa: F401

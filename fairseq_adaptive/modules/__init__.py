"""The mechanisms: tensors in, tensors out.

Plain torch, but for ``EncoderLayer`` and ``DecoderLayer``, which are fairseq's and imported when they are asked for.
"""

from fairseq_adaptive.modules.admin import AdminResidual
from fairseq_adaptive.modules.relative_attention import KeyValueCache, RelativeAttention, RelativePositions
from fairseq_adaptive.modules.shared_encoder import ParameterSharedTransformerEncoder
from fairseq_adaptive.modules.stack import (
    STRATEGIES,
    DecoderStack,
    ForeignStack,
    LayerStack,
    Step,
    Trace,
    layer_schedule,
    recording,
)

__all__ = [
    "AdminResidual",
    "DecoderLayer",
    "DecoderStack",
    "EncoderLayer",
    "ForeignStack",
    "KeyValueCache",
    "LayerStack",
    "ParameterSharedTransformerEncoder",
    "RelativeAttention",
    "RelativePositions",
    "STRATEGIES",
    "Step",
    "Trace",
    "layer_schedule",
    "recording",
]


def __getattr__(name):
    if name not in ("DecoderLayer", "EncoderLayer"):
        raise AttributeError(f"module {__name__} has no attribute {name}")
    from fairseq_adaptive.modules import transformer_layer

    return getattr(transformer_layer, name)

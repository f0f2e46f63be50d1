"""The mechanisms: tensors in, tensors out.

Plain torch, but for ``EncoderLayer`` and ``DecoderLayer``, which are fairseq's and imported when they are asked for.
"""

from fairseq_adaptive.modules.layers.admin import AdminResidual
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
from fairseq_adaptive.modules.transformer_xl.relative_attention import (
    KeyValueCache,
    RelativeAttention,
    RelativePositions,
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
    from fairseq_adaptive.modules.layers import transformer_layer

    return getattr(transformer_layer, name)

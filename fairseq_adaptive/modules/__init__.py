"""The mechanisms, in plain torch: tensors in, tensors out."""

from fairseq_adaptive.modules.admin import AdminResidual
from fairseq_adaptive.modules.relative_attention import KeyValueCache, RelativeAttention, RelativePositions
from fairseq_adaptive.modules.shared_encoder import ParameterSharedTransformerEncoder
from fairseq_adaptive.modules.stack import (
    STRATEGIES,
    DecoderStack,
    LayerStack,
    Step,
    Trace,
    layer_schedule,
    recording,
)
from fairseq_adaptive.modules.transformer_layer import DecoderLayer, EncoderLayer

__all__ = [
    "AdminResidual",
    "DecoderLayer",
    "DecoderStack",
    "EncoderLayer",
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

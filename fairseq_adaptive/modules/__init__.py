"""The mechanisms, in plain torch: tensors in, tensors out."""

from fairseq_adaptive.modules.admin import AdminResidual
from fairseq_adaptive.modules.relative_attention import KeyValueCache, RelativeAttention, RelativePositions
from fairseq_adaptive.modules.shared_encoder import ParameterSharedTransformerEncoder
from fairseq_adaptive.modules.sharing import STRATEGIES, layer_schedule
from fairseq_adaptive.modules.stack import DecoderStack, LayerStack
from fairseq_adaptive.modules.trace import Step, Trace, recording
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

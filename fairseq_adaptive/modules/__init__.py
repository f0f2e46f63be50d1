"""The mechanisms, in plain torch: tensors in, tensors out."""

from fairseq_adaptive.modules.admin import AdminResidual
from fairseq_adaptive.modules.shared_encoder import ParameterSharedTransformerEncoder
from fairseq_adaptive.modules.sharing import STRATEGIES, layer_schedule
from fairseq_adaptive.modules.stack import LayerStack
from fairseq_adaptive.modules.transformer_layer import DecoderLayer, EncoderLayer

__all__ = [
    "AdminResidual",
    "DecoderLayer",
    "EncoderLayer",
    "LayerStack",
    "ParameterSharedTransformerEncoder",
    "STRATEGIES",
    "layer_schedule",
]

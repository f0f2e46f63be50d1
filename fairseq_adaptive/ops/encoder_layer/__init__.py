"""A layer of an encoder over packed sentences in one call, in float32 or with maps of int8; and the scores of a predictor."""

import torch

from fairseq_adaptive.ops.encoder_layer.naive import Predictor
from fairseq_adaptive.ops.registry import Op

__all__ = ["OP", "Predictor"]
OP = Op(
    "encoder_layer",
    # torch's is the definition; where it is chosen the modules do the work
    {"native": f"{__name__}.native:PackedLayer", "torch": f"{__name__}.naive:encoder_layer"},
    (torch.float32,),
)

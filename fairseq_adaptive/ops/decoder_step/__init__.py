"""A step of beam search in one call: all depths of a decoder, the output layer and the best candidates."""

from fairseq_adaptive.ops.decoder_step.naive import Asked, Decoder, Halting, Int8Map, Layer, Map, Norm, Stack
from fairseq_adaptive.ops.registry import Op

__all__ = ["OP", "Asked", "Decoder", "Halting", "Int8Map", "Layer", "Map", "Norm", "Stack"]
OP = Op(
    "decoder_step",
    # torch's is the definition; where it is chosen decoding/decoder_step.py does the work
    {"native": f"{__name__}.native:Search", "torch": f"{__name__}.naive:Search"},
)

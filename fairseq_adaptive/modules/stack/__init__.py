"""The stack of layers, its two runs, and the trace that they leave."""

from fairseq_adaptive.modules.stack.schedule import STRATEGIES, check_kinds, layer_schedule
from fairseq_adaptive.modules.stack.stack import LayerStack
from fairseq_adaptive.modules.stack.decoder_stack import DecoderStack
from fairseq_adaptive.modules.stack.foreign import ForeignStack
from fairseq_adaptive.modules.stack.trace import Step, Trace, recording

__all__ = [
    "DecoderStack",
    "ForeignStack",
    "LayerStack",
    "STRATEGIES",
    "Step",
    "Trace",
    "check_kinds",
    "layer_schedule",
    "recording",
]

"""What a model with recurrence over segments remembers of the segments before (Transformer-XL)."""

from typing import List, Optional


class SegmentMemory:
    """The memory of one stream of segments; a model reads and replaces ``states`` in its forward.

    Args of a model's forward named ``memory`` are of this class. It is passed by reference, so that it goes through
    criterions, wrappers and scorers that know nothing of it.

    Attributes:
        states: None before the first segment; then what the model has put there, one entry a block: in training the
            detached inputs of an attention block, ``[B, M, C]``, in evaluation its keys and values; None for a block
            that needs no memory. Where a router or a rule hides tokens there is one more entry a block: which of the
            positions are seen, ``[B, M]``, or None
    """

    def __init__(self):
        self.states: Optional[List] = None

    def clear(self) -> None:
        self.states = None

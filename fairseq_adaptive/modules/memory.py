"""What a model with recurrence over segments remembers of the segments before (Transformer-XL)."""

from typing import Dict, List, Optional

import torch


class SegmentMemory:
    """The memory of one stream of segments; a model reads and replaces ``states`` in its forward.

    Args of a model's forward named ``memory`` are of this class. It is passed by reference, so that it goes through
    criterions, wrappers and scorers that know nothing of it.

    Attributes:
        states: None before the first segment; then what the model has put there, one entry a block: in training the
            detached inputs of an attention block, ``[B, M, C]``, in evaluation its keys and values; None for a block
            that needs no memory
    """

    def __init__(self):
        self.states: Optional[List] = None

    def clear(self) -> None:
        self.states = None

    def state_dict(self) -> Dict[int, torch.Tensor]:
        """The remembered tensors on the CPU, by their places in ``states``; that of a training only."""
        return {index: state.cpu() for index, state in enumerate(self.states or []) if state is not None}

    def load_state_dict(self, state_dict, device=None) -> None:
        """Put tensors back in their places; the others are None, for as many as the last place tells."""
        self.states = None
        if state_dict:
            self.states = [state_dict.get(index) for index in range(max(state_dict) + 1)]
            self.states = [state if state is None else state.to(device) for state in self.states]

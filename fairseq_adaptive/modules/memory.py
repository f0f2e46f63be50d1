"""What a model with recurrence over segments remembers of the segments before (Transformer-XL)."""

from typing import Dict, List, Optional

import torch


class SegmentMemory:
    """The memory of one stream of segments; a model reads and replaces ``states`` in its forward.

    Args of a model's forward named ``memory`` are of this class. It is passed by reference, so that it goes through
    criterions, wrappers and scorers that know nothing of it.

    Attributes:
        states: None before the first segment; then what the model has put there: in training the detached inputs of
            each attention block, ``[B, M, C]``; in evaluation caches of keys and values
    """

    def __init__(self):
        self.states: Optional[List] = None

    def clear(self) -> None:
        self.states = None

    def state_dict(self) -> Dict[str, List[torch.Tensor]]:
        """The remembered tensors on the CPU; only that of a training can be saved."""
        return {"states": [state.cpu() for state in self.states or []]}

    def load_state_dict(self, state_dict, device=None) -> None:
        self.states = [state.to(device) for state in state_dict["states"]] or None

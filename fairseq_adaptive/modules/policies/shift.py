"""A threshold or a share that is moved, while a model is trained or after it, and saved with its weights."""

import math

import torch

FARTHEST = 40.0


class Shifted:
    """Mixin for policies that are modules; they call :meth:`register_shift`.

    Attributes:
        shift: scalar, how far it was moved, up to compute more; what it is added to is the policy's matter. None: it was
            not
    """

    def register_shift(self):
        self.register_buffer("shift", None)

    def move(self, by: float):
        """Compute more (above 0) or less."""
        self.set_shift(by if self.shift is None else float(self.shift) + by)

    def set_shift(self, to: float):
        """Move it to a place, at most :data:`FARTHEST` away."""
        device = next(self.parameters()).device
        self.shift = torch.full((), max(-FARTHEST, min(FARTHEST, to)), device=device)

    def shifted(self, value: float, by: float = 0.0) -> float:
        """``value``, a share or a threshold above 0, times e to the shift."""
        if self.shift is None and not by:
            return value
        return value * math.exp((0.0 if self.shift is None else float(self.shift)) + by)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        if f"{prefix}shift" not in state_dict:
            self.shift = None
        elif self.shift is None:
            self.set_shift(0.0)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

"""Keys and values of the positions before, which a Transformer-XL reads again in evaluation."""

from typing import Optional, Tuple

import torch
from torch import Tensor

from fairseq_adaptive.modules.transformer_xl.positions import ProjectedPositions


class KeyValueCache:
    """What one attention layer keeps of earlier positions in evaluation, so that nothing is projected twice.

    Made for one model with fixed weights: start a new one when they change. Gradients do not flow into the past.

    Args:
        length: how many positions are kept, M; None: all
        projected: of the layer, which may serve several depths and so have several caches; None: its own

    Attributes:
        visible: ``[B, M]``, true at the positions that are seen; None: all are
    """

    def __init__(self, length: Optional[int] = None, projected: Optional[ProjectedPositions] = None):
        self.length, self.visible = length, None
        self.projected = ProjectedPositions() if projected is None else projected
        self._buffers: Optional[Tuple[Tensor, Tensor]] = None  # [H, B, capacity, D]
        self._start = self._end = 0

    def __len__(self) -> int:
        return self._end - self._start

    @property
    def keys(self) -> Optional[Tensor]:
        """``[B, H, M, D]``, None before the first segment."""
        return None if self._buffers is None else self._view(0).transpose(0, 1)

    @property
    def values(self) -> Optional[Tensor]:
        """``[B, H, M, D]``, None before the first segment."""
        return None if self._buffers is None else self._view(1).transpose(0, 1)

    def reorder(self, new_order: Tensor) -> None:
        """Row b becomes what row ``new_order[b]`` was; ``[B']`` may be of another length, as in beam search."""
        if self._buffers is not None:
            self._buffers = tuple(buffer.index_select(1, new_order) for buffer in self._buffers)
        if self.visible is not None:
            self.visible = self.visible.index_select(0, new_order)

    def _view(self, which: int) -> Tensor:
        return self._buffers[which][:, :, self._start : self._end]

    def append(self, keys: Tensor, values: Tensor) -> Tuple[Tensor, Tensor]:
        """Add positions, each ``[H, B, T, D]``; return those kept until now and the new, ``[H, B, M + T, D]``."""
        new = keys.size(2)
        if self._buffers is None or self._end + new > self._buffers[0].size(2):
            self._make_room(keys, new)
        for buffer, added in zip(self._buffers, (keys, values)):
            buffer[:, :, self._end : self._end + new] = added.detach()
        past = self._view(0), self._view(1)
        self._end += new
        result = self._view(0), self._view(1)
        if keys.requires_grad or values.requires_grad:
            result = torch.cat((past[0], keys), 2), torch.cat((past[1], values), 2)
        if self.length is not None:
            self._start = max(self._start, self._end - self.length)
        return result

    def hide(self, visible: Tensor) -> Tensor:
        """Say which of the positions that are added next are seen, ``[B, T]``; return those kept until now and these,
        ``[B, M + T]``."""
        past = self.visible
        if past is None:
            past = torch.ones(len(visible), len(self), dtype=torch.bool, device=visible.device)
        seen = torch.cat((past, visible.detach() > 0), 1)
        self.visible = seen if self.length is None else seen[:, -self.length :]
        return seen

    def _make_room(self, keys, new):
        # a quarter to spare: the past is copied rarely, even when one position is added at a time
        kept = len(self)
        capacity = kept + new + max(kept // 4, 64 if new == 1 else 0)
        buffers = tuple(keys.new_empty(*keys.shape[:2], capacity, keys.size(3)) for _ in range(2))
        if kept:
            for which, buffer in enumerate(buffers):
                buffer[:, :, :kept] = self._view(which)
        self._buffers, self._start, self._end = buffers, 0, kept

    def positions(self, length: int, project) -> Tensor:
        """The projected positions of distances ``length - 1`` to 0, ``[H, length, D]``; ``project(n)`` makes n."""
        more = 0 if self.length is not None and len(self) == self.length else max(length // 4, 64)
        return self.projected(length, lambda n: project(n).detach(), more)

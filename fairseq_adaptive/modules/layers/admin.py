"""Admin: adaptive model initialisation for deep post-LN Transformers.

Liu et al., *Understanding the Difficulty of Training Transformers* (EMNLP 2020), Section 4.2: a residual branch becomes
``LayerNorm(f(x) + omega * x)``, where omega, a trained vector, starts at the standard deviation that the residual stream
has reached, so that no branch dominates a deep model at the start.
"""

import logging
import math
from typing import Optional

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)


class AdminResidual(nn.Module):
    """Residual scales omega for every depth and sublayer, set in the first training step.

    The profiling pass of the paper is the first forward pass in training mode: branch by branch, omega is set to the
    root of the summed variances of the branches before it (starting from 1 for the embeddings), averaged over workers.
    Layers shared between depths keep one omega per depth.

    What the profile found is kept in buffers and what is learned on top of it in the parameter ``offset``, which starts
    at 0. Training ``offset`` is training omega, and the half-precision optimizers of fairseq, which copy the parameters
    before the first step, cannot undo the profile.

    Args:
        depths: N, number of depths
        sublayers: residual branches in a layer (2 in an encoder layer, 3 in a decoder layer with cross-attention)
        dim: C, width of the model
    """

    def __init__(self, depths: int, sublayers: int, dim: int):
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(depths, sublayers, dim))
        self.register_buffer("start", torch.ones(depths, sublayers))
        self.register_buffer("is_profiled", torch.zeros(1))
        self._variance = 1.0
        self._profiled = False

    @property
    def profiled(self) -> bool:
        # once true it stays true: a flag of the host spares a GPU a synchronisation in every sublayer
        if not self._profiled:
            self._profiled = bool(self.is_profiled)
        return self._profiled

    def forward(self, branch: Tensor, x: Tensor, depth: int, sublayer: int, padding_mask: Optional[Tensor]) -> Tensor:
        """Return ``branch + omega * x``.

        Args:
            branch: output of the sublayer, T x B x C
            x: its input, T x B x C
            depth, sublayer: where in the stack
            padding_mask: B x T, true at padding, which does not count in the profile
        """
        if self.training and not self.profiled:
            self._profile(branch, x, depth, sublayer, padding_mask)
        omega = self.start[depth, sublayer] + self.offset[depth, sublayer]
        return branch + omega * x

    @torch.no_grad()
    def _profile(self, branch, x, depth, sublayer, padding_mask):
        if depth == sublayer == 0:
            self._variance = 1.0
        start = math.sqrt(self._variance)
        self.start[depth, sublayer] = start
        self._variance = self._token_variance(start * x, padding_mask) + self._token_variance(branch, padding_mask)

    @staticmethod
    def _token_variance(x, padding_mask) -> float:
        x = x.float()
        if padding_mask is not None:
            x = x[~padding_mask.transpose(0, 1)]
        variance = x.var(unbiased=False)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(variance)
            variance /= torch.distributed.get_world_size()
        return float(variance)

    def finish_profiling(self):
        """Keep the scales found from here on; called after the last depth of the first training step."""
        self.is_profiled.fill_(1)
        rows = "; ".join(" ".join(f"{value:.2f}" for value in row) for row in self.start.tolist())
        logger.info("Admin initialisation, residual scale of each sublayer, depth by depth: %s", rows)

    def extra_repr(self) -> str:
        return "depths={}, sublayers={}, dim={}".format(*self.offset.shape)

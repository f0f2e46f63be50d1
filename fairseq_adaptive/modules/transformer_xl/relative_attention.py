"""Attention with relative positions (Dai et al. 2019, *Transformer-XL*, section 3.3)."""

from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules.layers.known import is_plain, known
from fairseq_adaptive.modules.layers.prepacked_linear import LINEARS, PrepackedLinear
from fairseq_adaptive.ops import matmul
from fairseq_adaptive.ops.relative_attention import relative_attention, some, step


class RelativePositions(nn.Module):
    """Sinusoids of distances, the R of Transformer-XL: all sines, then all cosines. It has no parameters.

    Args:
        embed_dim: C, even
        clamp_length: larger distances are encoded as this one; 0: none is
        dropout: on the encodings

    Raises:
        UsageError: when ``embed_dim`` is odd
    """

    def __init__(self, embed_dim: int, clamp_length: int = 0, dropout: float = 0.0):
        super().__init__()
        if embed_dim % 2:
            raise UsageError(f"relative positions need an even embedding dimension, not {embed_dim}")
        self.embed_dim = embed_dim
        self.clamp_length = clamp_length
        self.dropout = dropout
        self._table: Optional[Tensor] = None

    def forward(self, length: int, like: Tensor) -> Tensor:
        """Encode the distances ``length - 1`` to 0, in this order: ``[length, C]``, dtype and device of ``like``."""
        table = self._table
        if table is None or len(table) < length or table.dtype != like.dtype or table.device != like.device:
            table = self._table = self._encode(length, like)
        return F.dropout(table[len(table) - length :], self.dropout, self.training)

    # a table made within inference_mode could not be used in training afterwards
    @torch.inference_mode(False)
    @torch.no_grad()
    def _encode(self, length: int, like: Tensor) -> Tensor:
        exact = torch.promote_types(like.dtype, torch.float32)
        distances = torch.arange(length - 1, -1, -1, device=like.device, dtype=exact)
        if self.clamp_length > 0:
            distances.clamp_(max=self.clamp_length)
        # rounded to fp32 even for a model in float64, as published weights were trained
        frequencies = 1 / 10000 ** (torch.arange(0.0, self.embed_dim, 2.0, dtype=torch.float32) / self.embed_dim)
        angles = distances[:, None] * frequencies.to(distances)
        return torch.cat((angles.sin(), angles.cos()), -1).to(like.dtype)


class KeyValueCache:
    """What one attention layer keeps of earlier positions in evaluation, so that nothing is projected twice.

    Made for one model with fixed weights: start a new one when they change. Gradients do not flow into the past.

    Args:
        length: how many positions are kept, M; None: all
    """

    def __init__(self, length: Optional[int] = None):
        self.length = length
        self._buffers: Optional[Tuple[Tensor, Tensor]] = None  # [H, B, capacity, D]
        self._start = self._end = 0
        self._positions: Optional[Tensor] = None

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
        if self._positions is None or self._positions.size(1) < length:
            more = 0 if self.length is not None and len(self) == self.length else max(length // 4, 64)
            self._positions = project(length + more).detach()
        return self._positions[:, self._positions.size(1) - length :]


@known
class RelativeAttention(nn.Module):
    """Causal attention of Transformer-XL over a segment and the memory of those before.

    score_ij = [(q_i + u) . k_j + (q_i + v) . W_R R_(i-j)] / sqrt(D), u the content and v the position bias. Residual,
    layer normalisation and the dropout of the output are left to the caller.

    Args:
        embed_dim: C
        num_heads: H
        head_dim: D; by default C / H
        dropout: on the attention probabilities
        content_bias, position_bias: ``[H, D]``, parameters shared with other layers; by default the layer's own

    Raises:
        UsageError: when ``head_dim`` is not given and ``num_heads`` does not divide ``embed_dim``
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        head_dim: Optional[int] = None,
        dropout: float = 0.0,
        content_bias: Optional[nn.Parameter] = None,
        position_bias: Optional[nn.Parameter] = None,
    ):
        super().__init__()
        if head_dim is None and embed_dim % num_heads:
            raise UsageError(f"{num_heads} attention heads do not divide the embedding dimension {embed_dim}")
        self.embed_dim, self.num_heads, self.dropout = embed_dim, num_heads, dropout
        self.head_dim = head_dim or embed_dim // num_heads
        inner = self.num_heads * self.head_dim
        self.qkv_proj = PrepackedLinear(embed_dim, 3 * inner, bias=False)
        self.position_proj = PrepackedLinear(embed_dim, inner, bias=False)
        self.out_proj = PrepackedLinear(inner, embed_dim, bias=False)
        for projection in (self.qkv_proj, self.position_proj, self.out_proj):
            nn.init.normal_(projection.weight, std=0.02)  # the public recipe's, also for the biases
        own = [nn.Parameter(torch.randn(num_heads, self.head_dim) * 0.02) for _ in range(2)]
        self.content_bias = own[0] if content_bias is None else content_bias
        self.position_bias = own[1] if position_bias is None else position_bias

    def forward(
        self,
        x: Tensor,
        positions: RelativePositions,
        memory: Optional[Tensor] = None,
        cache: Optional[KeyValueCache] = None,
        window: Optional[int] = None,
    ) -> Tensor:
        """Attend from each position of a segment to itself and what lies before.

        Args:
            x: ``[B, T, C]``
            positions: encodings of the distances
            memory: ``[B, M, C]``, the inputs right before ``x``
            cache: keys and values of the positions right before ``x``, instead of ``memory``; those of ``x`` are added
            window: each position sees this many keys, itself among them (``same_length`` of the public code, there
                equal to the memory's length); None: all of memory and segment

        Returns:
            ``[B, T, C]``

        Raises:
            ValueError: when both ``memory`` and ``cache`` are given
        """
        if memory is not None and cache is not None:
            raise ValueError("give memory or cache, not both")
        inner = self.num_heads * self.head_dim
        queries, keys, values = self.by_head(self.qkv_proj(x))  # H x B x T x D
        if memory is not None:  # apart from x: no gradient is computed for the memory
            past = self.by_head(self.keys_and_values(memory))
            keys, values = torch.cat((past[0], keys), 2), torch.cat((past[1], values), 2)  # H x B x K x D
        if cache is not None:
            keys, values = cache.append(keys, values)
        unseen = 0 if window is None else max(0, keys.size(2) - x.size(1) - window + 1)
        keys, values = keys[:, :, unseen:], values[:, :, unseen:]

        distances = self.distances(keys.size(2) + 1, positions, cache, x)
        operands = queries, keys, values, distances, self.content_bias, self.position_bias
        if x.size(1) == 1 and not (self.training or torch.is_grad_enabled()):
            out = step.attend(*operands)
        else:
            out = relative_attention(*operands, window, self.dropout if self.training else 0.0)
        return self.out_proj(out.permute(1, 2, 0, 3).reshape(*x.shape[:2], inner))

    def distances(
        self, length: int, positions: RelativePositions, cache: Optional[KeyValueCache], like: Tensor
    ) -> Tensor:
        """The projected positions of distances ``length - 1`` to 0, ``[H, length, D]``."""

        def project(length):
            projected = self.position_proj(positions(length, like))
            return projected.view(length, self.num_heads, self.head_dim).transpose(0, 1)

        return project(length) if cache is None else cache.positions(length, project)

    def queries(self, x: Tensor) -> Tensor:
        """``[..., C]`` to queries, ``[..., H D]``."""
        inner = self.num_heads * self.head_dim
        plain = is_plain(self.qkv_proj, LINEARS)
        return F.linear(x, self.qkv_proj.weight[:inner]) if plain else self.qkv_proj(x)[..., :inner]

    def keys_and_values(self, x: Tensor) -> Tensor:
        """``[..., C]`` to keys and values side by side, ``[..., 2 H D]``."""
        if not is_plain(self.qkv_proj, LINEARS):
            return self.qkv_proj(x)[..., self.num_heads * self.head_dim :]
        return matmul.linear(x, self.qkv_proj.weight[self.num_heads * self.head_dim :])

    def packed(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        positions: RelativePositions,
        groups,
        place: Tensor,
        cache: Optional[KeyValueCache] = None,
        window: Optional[int] = None,
        single: bool = False,
    ) -> Tensor:
        """Attend from some of the last T positions, for inference.

        Args:
            queries: ``[P, H D]``
            keys, values: ``[H, B, K, D]``, memory and segment
            groups: the :class:`~fairseq_adaptive.modules.stack.packing.Groups` of the P queries
            place: ``[P]``, where each query is among the K positions
            cache: keeps the projected positions
            single: T is 1, and all keys are within the window

        Returns:
            ``[P, C]``
        """
        length = keys.size(2)
        distances = self.distances(length + 1, positions, cache, queries)
        keys, values = (groups.select(each, 1) for each in (keys, values))
        if single:
            queries = queries.view(len(queries), self.num_heads, self.head_dim).transpose(0, 1)
            queries = queries.unsqueeze(2).contiguous()
            out = step.attend(queries, keys, values, distances, self.content_bias, self.position_bias)
            return self.out_proj(out.squeeze(2).transpose(0, 1).flatten(1))
        queries = groups.pad(queries).unflatten(-1, (self.num_heads, self.head_dim)).permute(2, 0, 1, 3)  # H G Q D
        operands = queries, keys, values, distances, self.content_bias, self.position_bias
        out = some.attend(*operands, groups.pad(place), window)
        return self.out_proj(groups.unpad(out.permute(1, 2, 0, 3).flatten(2)))

    def by_head(self, x: Tensor) -> Tensor:
        # heads first: so the rows of all sentences meet the positions of a head in one product
        return x.view(*x.shape[:2], -1, self.num_heads, self.head_dim).permute(2, 3, 0, 1, 4).contiguous()

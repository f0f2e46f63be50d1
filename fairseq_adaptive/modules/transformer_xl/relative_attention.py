"""Attention with relative positions (Dai et al. 2019, *Transformer-XL*, section 3.3)."""

from typing import Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules.layers.known import is_plain, known
from fairseq_adaptive.modules.layers.prepacked_linear import LINEARS, PrepackedLinear
from fairseq_adaptive.modules.transformer_xl.cache import KeyValueCache
from fairseq_adaptive.modules.transformer_xl.positions import LayerPositions, RelativePositions
from fairseq_adaptive.ops import matmul
from fairseq_adaptive.ops.relative_attention import hidden, queries, relative_attention, step


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
        positions: Union[RelativePositions, LayerPositions],
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
        queries, keys, values = self.by_head(self.qkv_proj(x))  # H x B x T x D
        if memory is not None:  # apart from x: no gradient is computed for the memory
            past = self.by_head(self.keys_and_values(memory))
            keys, values = torch.cat((past[0], keys), 2), torch.cat((past[1], values), 2)  # H x B x K x D
        if cache is not None:
            keys, values = cache.append(keys, values)
        return self.over(queries, keys, values, x, positions, cache, window)

    def over(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        x: Tensor,
        positions: Union[RelativePositions, LayerPositions],
        cache: Optional[KeyValueCache] = None,
        window: Optional[int] = None,
        seen: Optional[Tensor] = None,
    ) -> Tensor:
        """Attend from the last T positions.

        Args:
            queries: ``[H, B, T, D]``
            keys, values: ``[H, B, K, D]``, of memory and segment
            x: ``[B, T, C]``, what the queries were made of
            cache: keeps the projected positions
            seen: ``[B, K]``, 0 at keys that all but their own queries leave out, with a gradient where it has one

        Returns:
            ``[B, T, C]``
        """
        unseen = 0 if window is None else max(0, keys.size(2) - x.size(1) - window + 1)
        keys, values = keys[:, :, unseen:], values[:, :, unseen:]
        distances = self.distances(keys.size(2) + 1, positions, cache, x)
        operands = queries, keys, values, distances, self.content_bias, self.position_bias
        seen = None if seen is None else seen[:, unseen:]
        if x.size(1) == 1 and not (self.training or torch.is_grad_enabled()):
            out = step.attend(*operands, None if seen is None else seen > 0)
        elif seen is not None:
            out = hidden.attend(*operands, seen, window, self.dropout if self.training else 0.0)
        else:
            out = relative_attention(*operands, window, self.dropout if self.training else 0.0)
        return self.out_proj(out.permute(1, 2, 0, 3).reshape(*x.shape[:2], self.num_heads * self.head_dim))

    def distances(
        self,
        length: int,
        positions: Union[RelativePositions, LayerPositions],
        cache: Optional[KeyValueCache],
        like: Tensor,
    ) -> Tensor:
        """The projected positions of distances ``length - 1`` to 0, ``[H, length, D]``."""

        def project(length):
            projected = self.position_proj(positions(length, like))
            return projected.view(length, self.num_heads, self.head_dim).transpose(0, 1)

        if cache is not None:
            return cache.positions(length, project)
        return positions.projected(length, project) if isinstance(positions, LayerPositions) else project(length)

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
        states: Tensor,
        keys: Tensor,
        values: Tensor,
        positions: Union[RelativePositions, LayerPositions],
        groups,
        place: Tensor,
        cache: Optional[KeyValueCache] = None,
        window: Optional[int] = None,
        single: bool = False,
        seen: Optional[Tensor] = None,
    ) -> Tensor:
        """Attend from some of the last T positions, for inference.

        Args:
            states: ``[P, H D]``, queries
            keys, values: ``[H, B, K, D]``, memory and segment
            groups: the :class:`~fairseq_adaptive.modules.stack.packing.Groups` of the P queries
            place: ``[P]``, where each query is among the K positions
            cache: keeps the projected positions
            single: T is 1, and all keys are within the window
            seen: ``[B, K]``, false at keys that only their own queries see; None: all are seen

        Returns:
            ``[P, C]``
        """
        length = keys.size(2)
        distances = self.distances(length + 1, positions, cache, states)
        keys, values = (groups.select(each, 1) for each in (keys, values))
        seen = None if seen is None else groups.select(seen)
        if single:
            states = states.view(len(states), self.num_heads, self.head_dim).transpose(0, 1).unsqueeze(2).contiguous()
            out = step.attend(states, keys, values, distances, self.content_bias, self.position_bias, seen)
            return self.out_proj(out.squeeze(2).transpose(0, 1).flatten(1))
        states = groups.pad(states).unflatten(-1, (self.num_heads, self.head_dim)).permute(2, 0, 1, 3)  # H G Q D
        operands = states, keys, values, distances, self.content_bias, self.position_bias
        out = queries.attend(*operands, groups.pad(place), window, seen)
        return self.out_proj(groups.unpad(out.permute(1, 2, 0, 3).flatten(2)))

    def by_head(self, x: Tensor) -> Tensor:
        # heads first: so the rows of all sentences meet the positions of a head in one product
        return x.view(*x.shape[:2], -1, self.num_heads, self.head_dim).permute(2, 3, 0, 1, 4).contiguous()

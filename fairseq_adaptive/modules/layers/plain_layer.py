"""fairseq's encoder layer for inference in plain torch: its parameters, names and arithmetic, without its dropout."""

from typing import Callable, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules.layers.attends import Attends
from fairseq_adaptive.modules.layers.known import known
from fairseq_adaptive.modules.layers.native_layer import Parts
from fairseq_adaptive.modules.layers.prepacked_linear import PrepackedLinear

# by fairseq's names
ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_accurate": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_fast": lambda x: F.gelu(x, approximate="tanh"),
    "tanh": torch.tanh,
    "linear": lambda x: x,
    "swish": F.silu,
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """
    Raises:
        UsageError: for a name that is not among :data:`ACTIVATIONS`
    """
    if name not in ACTIVATIONS:
        raise UsageError(f"unknown activation {name!r}: plain layers have {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


@known
class PlainAttention(nn.Module):
    """Self-attention over all tokens of a sentence, under fairseq's parameter names.

    Args:
        dim: C
        heads: H, which divides C
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.num_heads, self.head_dim = heads, dim // heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (PrepackedLinear(dim, dim) for _ in range(4))
        self.dropout_module = nn.Dropout(0.0)

    def forward(self, x: Tensor, padding_mask: Optional[Tensor] = None) -> Tensor:
        """T x B x C, and B x T, true at padding -> T x B x C"""
        queries, keys, values = (
            each(x).unflatten(-1, (self.num_heads, self.head_dim)).permute(1, 2, 0, 3)
            for each in (self.q_proj, self.k_proj, self.v_proj)
        )
        seen = None if padding_mask is None else ~padding_mask[:, None, None]
        out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=seen)
        return self.out_proj(out.permute(2, 0, 1, 3).flatten(2))


@known
class PlainLayer(Attends, nn.Module):
    """Self-attention and feed-forward at one of the depths of a :class:`~fairseq_adaptive.modules.LayerStack`.

    The weights of :class:`~fairseq_adaptive.modules.EncoderLayer` load, and give the same in evaluation.

    Args:
        dim: C
        ffn_dim: inner width of the feed-forward
        heads: of attention
        activation_fn: of the feed-forward, fairseq's name
        normalize_before: pre-LN
        eps: of both norms

    Raises:
        UsageError: for an unknown activation
    """

    native = Parts((), {F.relu: "relu", F.gelu: "gelu"})

    def __init__(
        self,
        dim: int,
        ffn_dim: int,
        heads: int,
        activation_fn: str = "relu",
        normalize_before: bool = False,
        eps: float = 1e-5,
    ):
        super().__init__()
        self.embed_dim, self.normalize_before, self.activation_fn = dim, normalize_before, activation(activation_fn)
        self.self_attn = PlainAttention(dim, heads)
        self.self_attn_layer_norm, self.final_layer_norm = (nn.LayerNorm(dim, eps=eps) for _ in range(2))
        self.fc1, self.fc2 = PrepackedLinear(dim, ffn_dim), PrepackedLinear(ffn_dim, dim)

    def forward(
        self,
        x: Tensor,
        encoder_padding_mask: Optional[Tensor] = None,
        depth: int = 0,
        residual: Optional[Callable] = None,
        tape_len: int = 0,
        self_attention: Optional[Callable] = None,
        tape: Optional[Tensor] = None,
    ) -> Tensor:
        """T x B x C -> T x B x C; arguments are those of :class:`~fairseq_adaptive.modules.EncoderLayer`."""

        def attend(x):
            return self.self_attn(x, encoder_padding_mask)

        def feed_forward(x):
            return self.fc2(self.activation_fn(self.fc1(x)))

        blocks = (self.self_attn_layer_norm, self_attention or attend), (self.final_layer_norm, feed_forward)
        with self.running_at(depth):
            for number, (norm, block) in enumerate(blocks):
                branch = block(norm(x) if self.normalize_before else x)
                x = x + branch if residual is None else residual(branch, x, depth, number, encoder_padding_mask)
                x = x if self.normalize_before else norm(x)
        return x

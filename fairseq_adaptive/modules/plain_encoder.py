"""Encoders of fairseq_adaptive's families for inference in plain torch, from a description that JSON can hold."""

import math
from dataclasses import dataclass, field
from typing import Any, Dict, Optional, Tuple

import torch
from torch import Tensor, nn

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules.layers.admin import AdminResidual
from fairseq_adaptive.modules.layers.plain_layer import PlainLayer, activation
from fairseq_adaptive.modules.policies import Place, build_policy
from fairseq_adaptive.modules.stack import LayerStack
from fairseq_adaptive.modules.stack.run import run_dense
from fairseq_adaptive.modules.stack.static_context import StaticContext
from fairseq_adaptive.modules.tracing import is_traced

TRACEABLE = ("skimming", "act", "ut_act", "pondernet", "loop_gate", "stick_breaking", "saturation")
POSITIONS = ("learned", "sinusoidal", "from_zero", "none")
EPS = 1e-5


@dataclass
class EncoderDescription:
    """What an encoder is made of.

    Attributes:
        vocabulary: V
        dim, ffn_dim, heads: widths of the layers, and their attention heads
        schedule: N, the number of the layer that serves each depth
        input_dim: E, width of the embeddings, which are projected to C; 0: they have C
        padding, separator: numbers of words
        positions: ``learned`` counts tokens, and from behind the number of padding, as fairseq does; ``sinusoidal`` counts
            likewise; ``from_zero`` is a learned table from 0; or ``none``
        max_positions: the longest sequence
        segments: token types that have embeddings
        segments_after_separator: the second type begins after the first separator; else it has to be given
        scale: of the embeddings of words
        embedding_norm, final_norm: LayerNorm after the embeddings and after the layers
        activation_fn: of the feed-forwards
        normalize_before: pre-LN
        eps, embedding_eps: of the norms
        policy_eps: of those in the halting rule and the reader (default: their own)
        admin: residual scales of ``--init admin``
        lora_rank: of what shared maps differ by from depth to depth
        protect_first, protect_separators: what a router must not leave out
        without_padding: of :class:`~fairseq_adaptive.modules.LayerStack`
        router, halting, reader: of each policy ``name``, ``options``, ``kv`` and ``quantile``, or None
    """

    vocabulary: int
    dim: int
    ffn_dim: int
    heads: int
    schedule: Tuple[int, ...]
    input_dim: int = 0
    padding: int = 1
    separator: int = 2
    positions: str = "learned"
    max_positions: int = 512
    segments: int = 0
    segments_after_separator: bool = False
    scale: float = 1.0
    embedding_norm: bool = False
    final_norm: bool = False
    activation_fn: str = "relu"
    normalize_before: bool = False
    eps: float = EPS
    embedding_eps: float = EPS
    policy_eps: Optional[float] = None
    admin: bool = False
    lora_rank: int = 0
    protect_first: bool = False
    protect_separators: bool = False
    without_padding: bool = False
    router: Optional[Dict[str, Any]] = field(default=None)
    halting: Optional[Dict[str, Any]] = field(default=None)
    reader: Optional[Dict[str, Any]] = field(default=None)

    @classmethod
    def read(cls, content: Dict[str, Any]) -> "EncoderDescription":
        """From JSON.

        Raises:
            UsageError: for names that are unknown or missing, and values of another kind
        """
        try:
            made = cls(**content)
            made.schedule = tuple(int(number) for number in made.schedule)
        except (TypeError, ValueError) as error:
            raise UsageError(f"the description of the encoder is that of another version: {error}") from None
        for name in ("vocabulary", "dim", "ffn_dim", "heads", "max_positions"):
            if (
                isinstance(getattr(made, name), bool)
                or not isinstance(getattr(made, name), int)
                or getattr(made, name) < 1
            ):
                raise UsageError(f"{name} of the encoder is {getattr(made, name)!r:.40}: it is a whole number above 0")
        if made.dim % made.heads:
            raise UsageError(f"the encoder has {made.heads} heads, which do not divide its width of {made.dim}")
        if made.positions not in POSITIONS:
            raise UsageError(
                f"positions of the encoder are {made.positions!r:.40}: they are one of {', '.join(POSITIONS)}"
            )
        return made


class PlainEncoder(nn.Module):
    """Words to states, under the parameter names of the families' own encoders; inference only, without dropout.

    Args:
        about: what it is made of

    Raises:
        UsageError: for a description that makes no encoder
    """

    def __init__(self, about: EncoderDescription):
        super().__init__()
        self.about, dim, width = about, about.dim, about.input_dim or about.dim
        self.embed_tokens = nn.Embedding(about.vocabulary, width, about.padding)
        rows = about.max_positions + (about.padding + 1 if about.positions == "learned" else 0)
        self.embed_positions = nn.Embedding(rows, width) if about.positions in ("learned", "from_zero") else None
        if about.positions == "sinusoidal":
            table = sinusoids(about.max_positions + about.padding + 1, width, about.padding)
            self.register_buffer("sinusoids", table, persistent=False)
        self.embed_segments = nn.Embedding(about.segments, width) if about.segments else None
        self.layernorm_embedding = nn.LayerNorm(width, eps=about.embedding_eps) if about.embedding_norm else None
        self.project_in_dim = nn.Linear(width, dim) if about.input_dim else None
        layers = [
            PlainLayer(dim, about.ffn_dim, about.heads, about.activation_fn, about.normalize_before, about.eps)
            for _ in range(max(about.schedule) + 1)
        ]
        place = Place(dim, len(about.schedule), None, about.heads, about.schedule)
        router, halting, self.reader = (
            _policy(kind, getattr(about, kind), place) for kind in ("router", "halting", "reader")
        )
        self.layers = LayerStack(
            layers,
            about.schedule,
            residual=AdminResidual(len(about.schedule), 2, dim) if about.admin else None,
            pass_depth=True,
            halting=halting,
            router=router,
            router_kv=(about.router or {}).get("kv"),
            halting_kv=(about.halting or {}).get("kv"),
            lora_rank=about.lora_rank,
        )
        self.layers.check_reader(self.reader)
        for policy in filter(None, (halting, self.reader) if about.policy_eps is not None else ()):
            for norm in (each for each in policy.modules() if isinstance(each, nn.LayerNorm)):
                norm.eps = about.policy_eps
        self.layers.without_padding = about.without_padding
        self.layer_norm = nn.LayerNorm(dim, eps=about.eps) if about.final_norm else None
        self.eval()

    def forward(self, tokens: Tensor, segments: Optional[Tensor] = None) -> Tensor:
        """
        Args:
            tokens: [B, T], padded on the right
            segments: [B, T], token types (default: by separators, or 0)

        Returns:
            states [B, T, C]; of a reader's tokens none. While it is traced, :meth:`dense`

        Raises:
            UsageError: for sequences that are longer than the encoder reads
        """
        if is_traced():
            return self.dense(tokens, segments)
        length = tokens.size(1)
        if length > self.about.max_positions:
            raise UsageError(
                f"a sequence of {length} tokens is longer than the {self.about.max_positions} that the model reads"
            )
        x, padding, protected = self._start(tokens, segments)
        x = self.layers(x, padding if padding.any() else None, protected, reader=self.reader)
        return self._leave(x if self.reader is None else x[0][:length])

    def dense(self, tokens: Tensor, segments: Optional[Tensor] = None) -> Tensor:
        """:meth:`forward` without anything that depends on what is decided, for a trace: every token is computed at every
        depth, and decisions are masks.

        Raises:
            UsageError: see :meth:`check_dense`
        """
        self.check_dense()
        x, padding, protected = self._start(tokens, segments)
        return self._leave(run_dense(self.layers, StaticContext(x, padding, self.layers.kv), protected))

    def check_dense(self):
        """
        Raises:
            UsageError: for a policy whose decisions are not made token by token, by name
        """
        found = (self.layers.router, self.layers.halting, self.reader)
        for policy in filter(None, found):
            if policy.policy_name not in TRACEABLE:
                raise UsageError(
                    f"{policy.policy_name} compares tokens with each other or reads from a bank, which is not traced: of "
                    f"policies {', '.join(TRACEABLE)} are, and any model without (counterpart)"
                )

    def _start(self, tokens, segments):
        """States T x B x C before the first depth, the padding B x T, and what a router must not leave out, B x T."""
        about, padding, protected = self.about, tokens.eq(self.about.padding), None
        x = self.embed_tokens(tokens)
        if self.embed_segments is not None:
            x = x + self.embed_segments(self._segments(tokens) if segments is None else segments)
        x = x * about.scale if about.scale != 1 else x
        x = x if about.positions == "none" else x + self._positions(padding)
        x = x if self.layernorm_embedding is None else self.layernorm_embedding(x)
        x = (x if self.project_in_dim is None else self.project_in_dim(x)).transpose(0, 1)
        if self.layers.router is not None and (about.protect_first or about.protect_separators):
            protected = tokens.eq(about.separator) if about.protect_separators else torch.zeros_like(padding)
            first = torch.arange(tokens.size(1), device=tokens.device) == 0
            protected = protected | first if about.protect_first else protected
        return x, padding, protected

    def _leave(self, x):
        """T x B x C -> B x T x C"""
        x = x.transpose(0, 1)
        return x if self.layer_norm is None else self.layer_norm(x)

    def _segments(self, tokens):
        if not self.about.segments_after_separator:
            return torch.zeros_like(tokens)
        ends = tokens.eq(self.about.separator).long()
        return (ends.cumsum(1) - ends).clamp(max=self.about.segments - 1)

    def _positions(self, padding):
        """[B, T] -> [B or 1, T, E]"""
        if self.about.positions == "from_zero":
            return self.embed_positions.weight[None, : padding.size(1)]
        first = self.about.padding
        numbers = (~padding).long().cumsum(1) * (~padding).long() + first
        if self.about.positions == "learned":
            return self.embed_positions(numbers)
        return self.sinusoids[numbers]


def sinusoids(count: int, dim: int, padding: int) -> Tensor:
    """[count, dim], tensor2tensor's: all sines, then all cosines (Vaswani et al., 2017, section 3.5, has them in turn);
    0 at ``padding``."""
    half = dim // 2
    rates = torch.exp(torch.arange(half, dtype=torch.float) * -(math.log(10000) / (half - 1)))
    angles = torch.arange(count, dtype=torch.float)[:, None] * rates
    table = torch.cat((angles.sin(), angles.cos(), angles.new_zeros(count, dim % 2)), 1)
    table[padding] = 0
    return table


class ClassificationHead(nn.Module):
    """RoBERTa's, on the first state.

    Args:
        dim, inner_dim: widths of states and of what is between the two maps
        classes: K
        activation_fn: between them, fairseq's name
    """

    def __init__(self, dim: int, inner_dim: int, classes: int, activation_fn: str = "tanh"):
        super().__init__()
        self.dense, self.out_proj = nn.Linear(dim, inner_dim), nn.Linear(inner_dim, classes)
        self.activation_fn = activation(activation_fn)

    def forward(self, states: Tensor) -> Tensor:
        """[B, T, C] -> [B, K]"""
        return self.out_proj(self.activation_fn(self.dense(states[:, 0])))


class PlainClassifier(nn.Module):
    """An encoder and a classification head, called as fairseq's models are.

    Args:
        encoder: of the words
        head: of the classes
    """

    def __init__(self, encoder: PlainEncoder, head: ClassificationHead):
        super().__init__()
        self.encoder, self.head = encoder, head
        self.eval()

    def forward(self, tokens: Tensor, segments: Optional[Tensor] = None, **unused):
        """[B, T] -> scores [B, K], and a dict"""
        return self.head(self.encoder(tokens, segments)), {}

    def max_positions(self) -> int:
        return self.encoder.about.max_positions


def _policy(kind: str, given: Optional[Dict[str, Any]], place: Place):
    if given is None:
        return None
    if not isinstance(given, dict) or not isinstance(given.get("options", {}), dict):
        raise UsageError(f"the {kind} of the encoder is {given!r:.60}: it is an object with a name and options")
    policy = build_policy(kind, given.get("name"), place, **given.get("options", {}))
    if given.get("quantile") is not None and policy is not None:
        policy.exit_at(float(given["quantile"]))
    return policy

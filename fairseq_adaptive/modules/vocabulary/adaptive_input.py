"""Embeddings over clusters of a vocabulary sorted by frequency: those of rare words can be narrow.

Baevski and Auli 2019, *Adaptive Input Representations*; laid out as in Dai et al. 2019, *Transformer-XL*, whose
weights fit.
"""

from typing import List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.ops.matmul import linear


def parse_cutoffs(text: Optional[str], flag: str = "--adaptive-softmax-cutoff") -> List[int]:
    """``"1000,5000"`` and ``"[1000, 5000]"`` to ``[1000, 5000]``; None or an empty text to ``[]``.

    Raises:
        UsageError: where it is no list of whole numbers
    """
    numbers = str(text or "").strip()
    numbers = numbers[1:-1] if numbers[:1] + numbers[-1:] in ("[]", "()") else numbers
    try:
        return [int(cutoff) for cutoff in numbers.split(",") if cutoff.strip()]
    except ValueError as error:
        raise UsageError(f"{flag} {text!r} is no comma separated list of whole numbers such as 1000,5000") from error


def cluster_ends(vocab_size: int, cutoffs: Sequence[int]) -> Tuple[int, ...]:
    """Return where each cluster ends: the cutoffs, then the size of the vocabulary.

    Raises:
        UsageError: when cutoffs do not increase or one is not within 1 and ``vocab_size - 1``
    """
    ends = (*cutoffs, vocab_size)
    if any(end <= start for start, end in zip((0, *ends), ends)):
        raise UsageError(
            f"adaptive cutoffs must be increasing numbers from 1 to {vocab_size - 1} (the vocabulary has {vocab_size} "
            f"entries, special symbols included), not {','.join(map(str, cutoffs))}"
        )
    return ends


def cluster_widths(embed_dim: int, factor: float, clusters: int) -> List[int]:
    """Return the width of each cluster's embeddings, ``embed_dim // factor**i``.

    Raises:
        UsageError: when the factor is below 1, or leaves a cluster without any width
    """
    if factor < 1:
        raise UsageError(f"the factor between the widths of adaptive clusters must be at least 1, not {factor:g}")
    widths = [int(embed_dim // factor**cluster) for cluster in range(clusters)]
    if widths[-1] < 1:
        raise UsageError(
            f"an embedding of width {embed_dim} cannot shrink by the factor {factor:g} in {clusters - 1} adaptive "
            "clusters: use a smaller factor or fewer cutoffs"
        )
    return widths


def normal_parameter(*shape: int, std: float) -> nn.Parameter:
    """Return a parameter of a normal distribution around 0."""
    return nn.Parameter(torch.randn(shape) * std)


def cluster_tables(ends: Sequence[int], embed_dim: int, factor: float) -> nn.ParameterList:
    """Return the embeddings of :class:`AdaptiveInput`: ``[V, embed_dim]``, or one table a cluster."""
    widths = cluster_widths(embed_dim, factor, len(ends))
    if factor == 1:
        return nn.ParameterList([normal_parameter(ends[-1], embed_dim, std=0.02)])
    return nn.ParameterList(
        normal_parameter(end - start, width, std=0.02) for start, end, width in zip((0, *ends), ends, widths)
    )


class AdaptiveInput(nn.Module):
    """Embeddings by cluster, scaled by ``sqrt(output_dim)`` (Transformer-XL's ``AdaptiveEmbedding``).

    ``tables`` holds one ``[V, embed_dim]`` where ``factor`` is 1, else a ``[size, embed_dim // factor**i]`` for each
    cluster; ``projections`` has a ``[output_dim, width]`` for each table, or none where ``factor`` is 1 and the widths agree.
    With ``factor`` 1 the cutoffs change nothing here: they are for the softmax that is tied to this.

    Args:
        vocab_size: V
        cutoffs: first word of each cluster but the first
        embed_dim: width of the first cluster
        factor: each cluster is this much narrower than the one before (``div_val``)
        output_dim: C; default: ``embed_dim``
        padding_idx: a word whose embedding is zero at first and gets no gradient from here

    Raises:
        UsageError: for impossible cutoffs, or a factor that does not fit
    """

    def __init__(
        self,
        vocab_size: int,
        cutoffs: Sequence[int],
        embed_dim: int,
        factor: float = 1.0,
        output_dim: Optional[int] = None,
        padding_idx: Optional[int] = None,
    ):
        super().__init__()
        self.ends = cluster_ends(vocab_size, cutoffs)
        self.embed_dim, self.factor, self.padding_idx = embed_dim, factor, padding_idx
        self.output_dim = output_dim or embed_dim
        self.tables = cluster_tables(self.ends, embed_dim, factor)
        self.projections = nn.ParameterList()
        if factor > 1 or self.output_dim != embed_dim:
            self.projections.extend(normal_parameter(self.output_dim, table.size(1), std=0.01) for table in self.tables)
        if padding_idx is not None:
            cluster, row = (0, padding_idx) if factor == 1 else self._place(padding_idx)
            with torch.no_grad():
                self.tables[cluster][row].zero_()

    def _place(self, word):
        cluster = sum(word >= end for end in self.ends)
        return cluster, word - (0, *self.ends)[cluster]

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed tokens of any shape: ``[...] -> [..., C]``.

        Raises:
            UsageError: when a token is outside the vocabulary; IndexError where ``factor`` is 1
        """
        if self.factor == 1:
            embedded = F.embedding(tokens, self.tables[0], self.padding_idx)
            if len(self.projections):
                embedded = linear(embedded, self.projections[0])
            return embedded * self.output_dim**0.5
        flat = tokens.reshape(-1)
        padding_cluster, padding_row = (None, None) if self.padding_idx is None else self._place(self.padding_idx)
        places, rows = [], []
        for cluster, (start, end) in enumerate(zip((0, *self.ends), self.ends)):
            place = ((flat >= start) & (flat < end)).nonzero().squeeze(-1)
            padding = padding_row if cluster == padding_cluster else None
            row = F.embedding(flat.index_select(0, place) - start, self.tables[cluster], padding)
            rows.append(linear(row, self.projections[cluster]))
            places.append(place)
        places = torch.cat(places)
        if len(places) < len(flat):
            raise UsageError(
                f"a token is outside the {self.ends[-1]} entries of the vocabulary: use the dictionary "
                "that the data were binarised with"
            )
        order = torch.empty_like(places)
        order[places] = torch.arange(len(places), device=places.device)
        embedded = torch.cat(rows).index_select(0, order) * self.output_dim**0.5
        return embedded.view(*tokens.shape, self.output_dim)

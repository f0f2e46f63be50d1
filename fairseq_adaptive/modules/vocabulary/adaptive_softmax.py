"""Softmax over clusters of a vocabulary sorted by frequency: rare words cost little.

Grave et al. 2017, *Efficient softmax approximation for GPUs*; laid out as in Dai et al. 2019, *Transformer-XL*, whose
weights fit.
"""

from typing import Callable, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules.layers.known import known
from fairseq_adaptive.modules.vocabulary.adaptive_input import (
    AdaptiveInput,
    cluster_ends,
    cluster_tables,
    cluster_widths,
    normal_parameter,
)
from fairseq_adaptive.ops import adaptive_cross_entropy, label_smoothed_cross_entropy
from fairseq_adaptive.ops.matmul import linear


def cross_entropies(logits: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tuple[Tensor, Tensor]:
    """Return (loss, nll), each ``[N]`` and at least float32, of logits ``[N, V]`` and targets ``[N]``.

    The smoothed target has probability ``1 - label_smoothing`` on the right word and the rest spread evenly over the
    other ``V - 1``, as in fairseq's ``label_smoothed_cross_entropy``. A softmax over one word has the loss 0.
    """
    return _CrossEntropies.apply(logits, target, label_smoothing if logits.size(-1) > 1 else 0.0)


class _CrossEntropies(torch.autograd.Function):
    """Keeps the logits in their own precision, and not log-probabilities: two thirds of autograd's memory, or less."""

    @staticmethod
    def forward(ctx, logits, target, label_smoothing):
        ctx.save_for_backward(logits, target)
        ctx.smoothing = (label_smoothing, label_smoothing / max(logits.size(-1) - 1, 1))
        total, each = ctx.smoothing
        log_probs = F.log_softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))
        nll = -log_probs.gather(-1, target[:, None]).squeeze(-1)
        loss = (1 - total - each) * nll - each * log_probs.sum(-1) if total else nll.clone()
        return loss, nll

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, loss_grad, nll_grad):
        logits, target = ctx.saved_tensors
        total, each = ctx.smoothing
        grad = torch.softmax(logits, -1, dtype=loss_grad.dtype).mul_((loss_grad + nll_grad)[:, None])
        if total:
            grad -= (each * loss_grad)[:, None]
        grad.scatter_add_(-1, target[:, None], -((1 - total - each) * loss_grad + nll_grad)[:, None])
        return grad.to(logits.dtype), None, None


def clustered_cross_entropies(
    hidden: Tensor,
    target: Tensor,
    ends: Sequence[int],
    head: Callable[[Tensor], Tensor],
    tail: Callable[[int, Tensor], Tensor],
    label_smoothing: float = 0.0,
) -> Tuple[Tensor, Tensor]:
    """Return (loss, nll), each ``[N]``, in the order of the targets; every parameter gets a gradient, if zero.

    Args:
        hidden: ``[N, C]``
        target: ``[N]``
        ends: where each cluster ends, the size of the vocabulary last
        head: hidden to the logits ``[N, ends[0] + K]`` of the first words, then of the K tails in order
        tail: number of the tail (0 is the second cluster) and its n rows of hidden to its logits ``[n, size]``
        label_smoothing: see :meth:`AdaptiveSoftmax.forward`

    Raises:
        UsageError: when a target is outside the vocabulary
    """
    head_target, indices, tail_targets = _by_cluster(target, ends)
    loss, nll = cross_entropies(head(hidden), head_target, label_smoothing)
    for number, (index, tail_target) in enumerate(zip(indices, tail_targets)):
        # a tail without a target goes on with no rows: DistributedDataParallel waits for the gradient of each parameter
        logits = tail(number, hidden.index_select(0, index))
        tail_loss, tail_nll = cross_entropies(logits, tail_target, label_smoothing)
        loss = loss.index_add(0, index, tail_loss)
        nll = nll.index_add(0, index, tail_nll) if label_smoothing else loss
    return loss, nll


def _by_cluster(target, ends):
    """The head's targets ``[N]``, and for each tail which of them are in it and their places there, ``[n]`` each."""
    if target.numel():
        low, high = torch.stack(target.aminmax()).tolist()
        if low < 0 or high >= ends[-1]:
            raise UsageError(
                f"target {high if low >= 0 else low} is outside the {ends[-1]} entries of the vocabulary: use the "
                "dictionary that the data were binarised with"
            )
    head_target, indices, targets = target, [], []
    for number, (start, end) in enumerate(zip(ends, ends[1:])):
        inside = (target >= start) & (target < end)
        head_target = head_target.masked_fill(inside, ends[0] + number)
        indices.append(inside.nonzero().squeeze(-1))
        targets.append(target.index_select(0, indices[-1]) - start)
    return head_target, indices, targets


@known
class AdaptiveSoftmax(nn.Module):
    """A softmax over the first words and the other clusters, and one within each of those.

    ``tables`` and ``projections`` are as in :class:`AdaptiveInput`, but with ``factor`` 1 every cluster has its own
    projection, where there are any. ``bias`` is ``[V]``; ``cluster_weight [K, embed_dim]`` and ``cluster_bias [K]``
    have one row for each of the K other clusters, the most frequent first (Transformer-XL's have it last).

    Args:
        vocab_size: V
        cutoffs: first word of each cluster but the first; none: a plain softmax
        input_dim: C
        factor: each cluster is this much narrower than the one before (``div_val``)
        tied_to: the input whose tables are used here, too; it gives the width of the first cluster
        tie_projections: whether each cluster uses the input's projection; True: all but the first, as Transformer-XL
        dropout: of the projected hidden states of all clusters but the first
        embed_dim: width of the first cluster, where nothing is tied; default: ``input_dim``

    Raises:
        UsageError: for impossible cutoffs, a factor that does not fit, or when what is to be tied differs
    """

    def __init__(
        self,
        vocab_size: int,
        cutoffs: Sequence[int],
        input_dim: int,
        factor: float = 1.0,
        tied_to: Optional[AdaptiveInput] = None,
        tie_projections: Union[bool, Sequence[bool]] = False,
        dropout: float = 0.0,
        embed_dim: Optional[int] = None,
    ):
        super().__init__()
        self.ends = cluster_ends(vocab_size, cutoffs)
        self.embed_dim = embed_dim or (tied_to.embed_dim if tied_to else input_dim)
        self.factor, self.dropout = factor, dropout
        clusters = len(self.ends)
        if isinstance(tie_projections, bool):
            tie_projections = [False] + [tie_projections] * (clusters - 1)
        if len(tie_projections) != clusters:
            raise UsageError(
                f"there are {clusters} adaptive clusters, but {len(tie_projections)} values that say "
                "whether to tie their projections"
            )
        if tied_to is None:
            self.tables = cluster_tables(self.ends, self.embed_dim, factor)
        else:
            ours, theirs = ((m.ends, m.embed_dim, m.factor) for m in (self, tied_to))
            if ours != theirs:
                raise UsageError(
                    "an adaptive softmax can be tied to an adaptive input with the same ends of clusters, "
                    f"width and factor: it has {ours}, the input {theirs}"
                )
            self.tables = nn.ParameterList(tied_to.tables)
        if any(tie_projections) and (tied_to is None or tied_to.output_dim != input_dim):
            raise UsageError(
                "the projections of an adaptive softmax can be tied to those of an adaptive input of the "
                "same output width, to whose embeddings it is tied"
            )
        self.projections = nn.ParameterList()
        if factor > 1 or input_dim != self.embed_dim:
            for cluster, width in enumerate(cluster_widths(self.embed_dim, factor, clusters)):
                self.projections.append(
                    tied_to.projections[0 if factor == 1 else cluster]
                    if tie_projections[cluster]
                    else normal_parameter(input_dim, width, std=0.01)
                )
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        if cutoffs:
            self.cluster_weight = normal_parameter(clusters - 1, self.embed_dim, std=0.02)
            self.cluster_bias = nn.Parameter(torch.zeros(clusters - 1))

    def _project(self, cluster, hidden):
        projected = linear(hidden, self.projections[cluster].t()) if len(self.projections) else hidden
        return F.dropout(projected, self.dropout, self.training) if cluster else projected

    def _sizes(self):
        return [end - start for start, end in zip((0, *self.ends), self.ends)]

    def _logit_functions(self):
        """The head and tail of :func:`clustered_cross_entropies`."""
        sizes = self._sizes()
        # split, and not slices: the backward pass then makes one gradient of the whole, not one a cluster
        weights = self.tables[0].split(sizes) if self.factor == 1 else self.tables
        biases = self.bias.split(sizes)

        def head(hidden):
            weight, bias = weights[0], biases[0]
            if len(sizes) > 1:
                weight, bias = torch.cat((weight, self.cluster_weight)), torch.cat((bias, self.cluster_bias))
            return F.linear(self._project(0, hidden), weight, bias)

        def tail(number, hidden):
            return F.linear(self._project(number + 1, hidden), weights[number + 1], biases[number + 1])

        return head, tail

    def summed(self, hidden: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tuple[Tensor, Tensor]:
        """Return the sums of what :meth:`forward` returns, for less time and memory; only the loss has a gradient.

        Args:
            hidden: ``[N, C]``
            target: ``[N]``
            label_smoothing: e

        Raises:
            UsageError: when a target is outside the vocabulary
        """
        head_target, indices, targets = _by_cluster(target, self.ends)
        if not indices:
            projected = self._project(0, hidden)
            return label_smoothed_cross_entropy(projected, self.tables[0], target, label_smoothing, self.bias)[:2]
        # a tail without a target has no rows, but gradients of zero: DistributedDataParallel waits for each
        rows = [self._project(number, hidden.index_select(0, index)) for number, index in enumerate(indices, start=1)]
        return adaptive_cross_entropy(
            [self._project(0, hidden), *rows],
            [head_target, *targets],
            list(self.tables),
            self._sizes(),
            self.bias,
            self.cluster_weight,
            self.cluster_bias,
            label_smoothing,
        )

    def forward(self, hidden: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tuple[Tensor, Tensor]:
        """Return (loss, nll) of every target, padding too, in input order; float32, or float64 for such input.

        A target in the first cluster uses the softmax of the head, another one that and the softmax of its cluster:
        ``nll = -log p_head(entry) [- log p_cluster(word)]``. Label smoothing of the V words would need all clusters for
        each target, so each softmax that a target uses is smoothed by itself. With e for label_smoothing and n entries
        in a softmax (the head has ``ends[0] + K``)::

            loss = sum over the softmaxes used of (1 - e) * -log p(right) + e / (n - 1) * sum of -log p(other)

        With one cluster this is fairseq's ``label_smoothed_cross_entropy``.

        Args:
            hidden: ``[..., C]``
            target: ``[...]``
            label_smoothing: e

        Raises:
            UsageError: when a target is outside the vocabulary, and for shapes that do not fit
        """
        if hidden.shape[:-1] != target.shape:
            raise UsageError(
                f"targets of {tuple(target.shape)} do not fit states of {tuple(hidden.shape)}; --criterion adaptive_loss is "
                "for fairseq's own adaptive softmax: use --criterion adaptive_cross_entropy"
            )
        rows, words = hidden.reshape(-1, hidden.size(-1)), target.reshape(-1)
        loss, nll = clustered_cross_entropies(rows, words, self.ends, *self._logit_functions(), label_smoothing)
        return loss.view(target.shape), nll.view(target.shape)

    def get_log_prob(self, hidden: Tensor, target: Optional[Tensor] = None) -> Tensor:
        """Log-probabilities ``[..., V]`` of hidden states ``[..., C]``, at least float32.

        With targets ``[...]``, every entry of a row is the log-probability of its target: a view that needs no memory,
        for fairseq's ``SequenceScorer``, which looks at no other entry. It cannot be changed in place.
        """
        if target is not None:
            nll = self(hidden, target)[1]
            return nll.neg().unsqueeze(-1).expand(*target.shape, self.ends[-1])
        head, tail = self._logit_functions()
        exact = torch.promote_types(hidden.dtype, torch.float32)
        words, clusters = F.log_softmax(head(hidden), -1, dtype=exact).tensor_split([self.ends[0]], -1)
        parts = [words]
        for number in range(len(self.ends) - 1):
            within = F.log_softmax(tail(number, hidden), -1, dtype=exact)
            parts.append(within + clusters[..., number : number + 1])
        return torch.cat(parts, -1)

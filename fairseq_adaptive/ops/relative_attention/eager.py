"""Relative attention on torch's own kernels, in pieces whose scores stay in the cache of a CPU."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from fairseq_adaptive.ops.matmul import products
from fairseq_adaptive.ops.random import kept_of, survivors
from fairseq_adaptive.ops.relative_attention.naive import hidden_keys

BLOCK = 128  # queries at a time in segments that are longer than two blocks
PIECE = 2**19  # scores at a time, or those of one head, row and block; more are slower, and fewer take more calls
DEVICE_PIECE = 2**26  # the same where there is no cache to fit


def attend(queries, keys, values, distances, content_bias, position_bias, window, dropout):
    """As ``naive.py`` defines it, with the dtype of ``queries`` for all but the biases."""
    inputs = queries, keys, values, distances, content_bias, position_bias
    gradient = torch.is_grad_enabled() and any(each.requires_grad for each in inputs)
    seed = int(torch.randint(2**62, ())) if dropout else None  # torch's seed and state decide it
    if gradient:
        return PiecewiseAttention.apply(*inputs, window, dropout, seed)
    return _Run(*inputs, window, dropout, seed).forward()


def scaled(bias, queries):
    """``[H, D]`` to ``[H, 1, 1, D]``."""
    return (bias * queries.size(3) ** -0.5).to(queries.dtype)[:, None, None]


def _weights(queries, keys, distances, content_bias, position_bias, window):
    """The weights of one piece, and the inputs of the products that give them.

    Args:
        queries: ``[n, G, t, D]``
        keys: ``[n, G, k, D]``
        distances: ``[n, k + 1, D]``
        content_bias, position_bias: ``[n, 1, 1, D]``, over the square root of D
        window: as in ``naive.py``

    Returns:
        weights ``[n G, t, k]``, queries by content ``[n G, t, D]`` and by position ``[n, G t, D]``, and keys
        ``[n G, k, D]``
    """
    queried, length, scale = queries.size(2), keys.size(2), queries.size(3) ** -0.5
    by_content = torch.add(content_bias, queries, alpha=scale).flatten(0, 1)
    by_position = torch.add(position_bias, queries, alpha=scale).flatten(1, 2)
    keys = keys.flatten(0, 1)
    scores = products(by_position, distances)  # n x G t x (k + 1), distances k to 0
    # row i needs distance k - t + i at key 0: one entry further to the left with each row of k + 1, so in rows of k
    scores = scores.view(len(keys), -1)[:, queried:].view(-1, queried, length)
    scores = products(by_content, keys, scores)
    if queried > 1 or window is not None and window < length:
        first, added = _added(queried, length, window, scores.dtype, scores.device)
        scores[:, :, first:] += added
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)), by_content, by_position, keys


@functools.lru_cache(maxsize=16)
def _added(queried, length, window, dtype, device):
    """-inf for the keys that queries must not see, ``[t, k']``, and the first key that not all of them see."""
    hidden = hidden_keys(queried, length, window, device)
    first = length - queried if window is None else 0
    return first, torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))[:, first:]


class PiecewiseAttention(torch.autograd.Function):
    """:class:`_Run` with gradients of the first six inputs."""

    @staticmethod
    def forward(ctx, *inputs):
        ctx.save_for_backward(*inputs[:6])
        ctx.settings = inputs[6:]
        return _Run(*inputs).forward()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        with torch.autocast(grad.device.type, enabled=False):
            return *_Run(*ctx.saved_tensors, *ctx.settings).backward(grad), None, None, None


class Piece(NamedTuple):
    """Which of heads, rows, queries and keys, and the first of the distances between those."""

    heads: slice
    rows: slice
    queries: slice
    keys: slice
    first: int

    def of(self, queries: Tensor) -> Tensor:
        return queries[self.heads, self.rows, self.queries]

    def of_keys(self, keys: Tensor) -> Tensor:
        return keys[self.heads, self.rows, self.keys]


class _Run:
    """One call: its inputs, its pieces, and its random numbers, which are drawn in the order of the pieces."""

    def __init__(self, queries, keys, values, distances, content_bias, position_bias, window, dropout, seed):
        self.queries, self.keys, self.values, self.distances = queries, keys, values, distances.contiguous()
        self.content_bias, self.position_bias = (scaled(bias, queries) for bias in (content_bias, position_bias))
        self.window, self.kept, self.generator = window, kept_of(dropout), None
        if 0 < self.kept < 1:
            self.generator = torch.Generator(queries.device).manual_seed(seed)

    def pieces(self):
        heads, batch, queried, _ = self.queries.shape
        if not self.queries.numel():
            return
        length, before = self.keys.size(2), self.keys.size(2) - queried
        block = queried if queried <= 2 * BLOCK else BLOCK
        limit = PIECE if self.queries.device.type == "cpu" else DEVICE_PIECE
        together = max(1, limit // (block * length))  # pairs of head and row
        rows = -(-batch // -(-batch // together))  # pieces of nearly one size
        several = max(1, together // batch)
        for head in range(0, heads, several):
            for row in range(0, batch, rows):
                for query in range(0, queried, block):
                    last = min(query + block, queried)
                    start = 0 if self.window is None else max(0, before + query - self.window + 1)
                    end = before + last
                    parts = (head, head + several), (row, row + rows), (query, last), (start, end)
                    yield Piece(*(slice(*part) for part in parts), self.distances.size(1) - (end - start) - 1)

    def weights(self, piece):
        """As :func:`_weights`, and the distances ``[n, k + 1, D]``."""
        biases = self.content_bias[piece.heads], self.position_bias[piece.heads]
        distances = self.distances[piece.heads, piece.first :]
        operands = piece.of(self.queries), piece.of_keys(self.keys), distances
        return *_weights(*operands, *biases, self.window), distances

    def survivors(self, weights):
        """What to multiply weights with: 0 where dropped, else 1 / probability to survive; None without dropout."""
        if self.kept == 1:
            return None
        if self.kept == 0:
            return torch.zeros_like(weights)
        kept = survivors(weights.shape, self.kept, weights.device, self.generator)
        return kept.to(weights.dtype).mul_(1 / self.kept)

    def forward(self):
        heads, batch, queried, dim = self.queries.shape
        out = self.queries.new_empty(batch, queried, heads, dim).permute(2, 0, 1, 3)  # as the projection after it reads
        for piece in self.pieces():
            weights, *_ = self.weights(piece)
            survivors = self.survivors(weights)
            if survivors is not None:
                weights.mul_(survivors)
            values = piece.of_keys(self.values).flatten(0, 1)  # n G x k x D
            into = piece.of(out)
            into.copy_(products(weights.to(values.dtype), values.transpose(1, 2)).view(into.shape))
        return out

    def backward(self, grad):
        """The gradients of queries, keys, values, distances, content bias and position bias."""
        dtype, exact = self.queries.dtype, torch.promote_types(self.queries.dtype, torch.float32)
        # whether each key is in one piece
        once = self.window is None and self.queries.size(2) <= 2 * BLOCK and self.queries.numel() > 0

        def new(like, make):  # D before K: a product is faster with the small matrix first
            return make(like.transpose(-1, -2).shape, dtype=exact, device=like.device)

        keys_grad, values_grad = (new(each, torch.empty if once else torch.zeros) for each in (self.keys, self.values))
        distances_grad, add = new(self.distances, torch.zeros), Tensor.copy_ if once else Tensor.add_
        queries_grad = torch.empty_like(self.queries, dtype=exact)
        biases_grad = [torch.zeros_like(bias, dtype=exact) for bias in (self.content_bias, self.position_bias)]
        for piece in self.pieces():
            weights, by_content, by_position, keys, distances = self.weights(piece)
            pairs, queried, length = weights.shape
            of_out = piece.of(grad).flatten(0, 1).contiguous()  # n G x t x D
            of_weights = products(of_out, piece.of_keys(self.values).flatten(0, 1)).to(exact)
            survivors, used = self.survivors(weights), weights
            if survivors is not None:
                of_weights.mul_(survivors)
                used = weights * survivors
            into = values_grad[piece.heads, piece.rows, :, piece.keys]  # n x G x D x k
            add(into, products(of_out.transpose(1, 2), used.to(dtype).transpose(1, 2)).view(into.shape))

            of_scores = torch.ops.aten._softmax_backward_data(of_weights, weights, -1, exact).to(dtype)
            of_rows = of_scores.new_empty(pairs, queried * (length + 1))  # shifted back
            of_rows[:, :queried] = 0
            of_rows[:, queried:].view_as(of_scores).copy_(of_scores)
            of_rows = of_rows.view(len(distances), -1, length + 1)  # n x G t x (k + 1)

            into = keys_grad[piece.heads, piece.rows, :, piece.keys]
            add(into, products(by_content.transpose(1, 2), of_scores.transpose(1, 2)).view(into.shape))
            into = distances_grad[piece.heads, :, piece.first :]
            into += products(by_position.transpose(1, 2), of_rows.transpose(1, 2))
            into = piece.of(queries_grad)
            of_content = products(of_scores, keys.transpose(1, 2)).view(into.shape)
            of_position = products(of_rows, distances.transpose(1, 2)).view(into.shape)
            into.copy_(of_content).add_(of_position)
            for bias_grad, term in zip(biases_grad, (of_content, of_position)):
                bias_grad[piece.heads] += term.sum((1, 2), keepdim=True, dtype=exact)
        scale = self.queries.size(3) ** -0.5
        queries_grad.mul_(scale)
        shared = keys_grad.transpose(2, 3), values_grad.transpose(2, 3), distances_grad.transpose(1, 2)
        biases = [each.flatten(1) * scale for each in biases_grad]
        return *(each.to(dtype) for each in (queries_grad, *shared)), *biases

"""The definition of a step of beam search over a decoder, and of an encoder, without padding: one row at a time.

A row is a hypothesis. Each step gives it a token, runs all depths over that token, and returns for each sentence the best
continuations of its rows. A row reads the keys and values of the tokens that it descends from.
"""

from typing import List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_adaptive.ops.int8_linear.naive import int8_linear

RULES = ("none", "act", "ut_act", "pondernet", "saturation", "margin")


class Norm(NamedTuple):
    """Of a layer norm: C, C."""

    gain: Tensor
    bias: Tensor
    eps: float

    def __call__(self, x):
        return F.layer_norm(x, self.gain.shape, self.gain, self.bias, self.eps)


class Map(NamedTuple):
    """Of a linear map: O x I, and O or None."""

    weight: Tensor
    bias: Optional[Tensor]

    def __call__(self, x):
        return F.linear(x, self.weight, self.bias)


class Int8Map(NamedTuple):
    """A :class:`Map` whose product is one of int8: O x I, and O or None."""

    weight: Tensor
    bias: Optional[Tensor]

    def __call__(self, x):
        found = int8_linear(x.reshape(-1, x.size(-1)), self.weight, self.bias).to(x.dtype)
        return found.view(*x.shape[:-1], -1)


class Layer(NamedTuple):
    """What a layer is made of; its maps are all :class:`Map` or all :class:`Int8Map`.

    Attributes:
        norms: of self-attention, cross-attention (None where there is none) and feed-forward
        qkv: C -> 3 C, the queries, keys and values of self-attention
        merge: C -> C, behind self-attention
        up, down: C -> F -> C
        query, source, merge_source: of cross-attention, C -> C, C' -> 2 C and C -> C; or None
    """

    norms: Tuple[Norm, Optional[Norm], Norm]
    qkv: Map
    merge: Map
    up: Map
    down: Map
    query: Optional[Map] = None
    source: Optional[Map] = None
    merge_source: Optional[Map] = None


class Stack(NamedTuple):
    """M layers that serve N depths.

    Attributes:
        schedule: N numbers of layers
        activation: ``relu`` or ``gelu``
        omega: N x sublayers x C, what a state is multiplied by where a branch is added to it (Admin); None: 1
        last: behind the last depth
    """

    layers: Sequence[Layer]
    schedule: Sequence[int]
    heads: int
    pre_norm: bool
    activation: str
    omega: Optional[Tensor] = None
    last: Optional[Norm] = None

    def add(self, branch, x, depth, sublayer):
        return x + branch if self.omega is None else branch + self.omega[depth, sublayer] * x

    def before(self, norm, x):
        return norm(x) if self.pre_norm else x

    def behind(self, norm, x):
        return x if self.pre_norm else norm(x)

    def attend(self, query, keys, values):
        """C over S x C and S x C."""
        query, keys, values = (each.unflatten(-1, (self.heads, -1)) for each in (query, keys, values))
        weights = (torch.einsum("hd,shd->hs", query, keys) * query.size(-1) ** -0.5).softmax(-1)
        return torch.einsum("hs,shd->hd", weights, values).flatten()

    def feed_forward(self, layer, x, depth):
        y = getattr(F, self.activation)(layer.up(self.before(layer.norms[2], x)))
        last = 1 if layer.source is None else 2
        return self.behind(layer.norms[2], self.add(layer.down(y), x, depth, last))


class Halting(NamedTuple):
    """Which rule says where a row stops, one of ``RULES``; ``weight``, C, and ``bias`` are those of its unit, if any."""

    rule: str = "none"
    threshold: float = 1.0
    weight: Optional[Tensor] = None
    bias: float = 0.0


class Decoder(NamedTuple):
    """A stack between words.

    Attributes:
        embedding: V x C, taken ``scale`` times; the position is added, and ``embedding_norm`` comes behind
        words: V x C, of the output layer
        small_words: whether its product is one of int8
    """

    stack: Stack
    embedding: Tensor
    scale: float
    words: Tensor
    embedding_norm: Optional[Norm] = None
    halting: Halting = Halting()
    small_words: bool = False


class Asked(NamedTuple):
    """What a step is asked.

    Attributes:
        tokens: (B Q), the newest token of each row; rows of a sentence stand together
        scores: (B Q), of hypotheses so far
        order: (B Q), which rows of the step before they continue; None in the first step, where Q is 1
        rows: Q
        position: C, what is added to the embedding, or None
        count: K, how many candidates of each sentence are wanted
        only: the one word that may follow, or -1
        changes: word to what is added to its log-probability
        heat: what logits are multiplied by, 1 / temperature
    """

    tokens: Tensor
    scores: Tensor
    order: Optional[Tensor]
    rows: int
    position: Optional[Tensor]
    count: int
    only: int = -1
    changes: dict = {}
    heat: float = 1.0


def encode(stack: Stack, x: Tensor, lengths: List[int]) -> Tensor:
    """P x C -> P x C; sentences of some lengths lie one after the other."""
    for depth, number in enumerate(stack.schedule):
        layer = stack.layers[number]
        new = []
        for sentence in layer.qkv(stack.before(layer.norms[0], x)).split(lengths):
            queries, keys, values = sentence.chunk(3, -1)
            new += [stack.attend(query, keys, values) for query in queries]
        x = stack.behind(layer.norms[0], stack.add(layer.merge(torch.stack(new)), x, depth, 0))
        x = stack.feed_forward(layer, x, depth)
    return x if stack.last is None else stack.last(x)


class Search:
    """The caches of one search.

    Args:
        decoder: what it runs
        lengths: B, of the sources; without cross-attention what they are does not matter
        states: P x C', of the sources, one after the other; None: there is no cross-attention
    """

    def __init__(self, decoder: Decoder, lengths: List[int], states: Optional[Tensor] = None):
        self._decoder, stack = decoder, decoder.stack
        self._sentence = list(range(len(lengths)))  # of each row
        self._past = [[[] for _ in stack.schedule] for _ in lengths]  # of each row and depth, pairs of keys and values
        self._source = {}  # of a layer, B times keys and values
        if states is not None:
            for number in set(stack.schedule):
                made = stack.layers[number].source(states).split(lengths)
                self._source[number] = [each.chunk(2, -1) for each in made]

    def step(self, asked: Asked) -> Tuple[Tensor, Tensor, Tensor]:
        """Return B x K each, best first: scores with those of the hypotheses added, words, and rows; where there are
        fewer: -inf, 0 and the first row. A row whose logits are not numbers has no continuations."""
        if asked.order is not None:
            order = asked.order.tolist()
            self._sentence = [self._sentence[row] for row in order]
            self._past = [[list(depth) for depth in self._past[row]] for row in order]
        states = torch.stack([self._decode(row, int(token), asked) for row, token in enumerate(asked.tokens)])
        lprobs = (self._words(states) * asked.heat).log_softmax(-1)
        for word, change in asked.changes.items():
            lprobs[:, word] += change
        if asked.only >= 0:
            lprobs[:, : asked.only] = lprobs[:, asked.only + 1 :] = float("-inf")
        total = (lprobs + asked.scores[:, None]).nan_to_num(float("-inf"), float("inf"), float("-inf"))
        total = total.view(len(total) // asked.rows, -1)
        best, index = F.pad(total, (0, max(0, asked.count - total.size(1))), value=float("-inf")).topk(asked.count)
        index = index.masked_fill(best == float("-inf"), 0)
        first = torch.arange(len(total)).unsqueeze(1) * asked.rows
        return best, index % lprobs.size(1), index.div(lprobs.size(1), rounding_mode="floor") + first

    def _decode(self, row, token, asked):
        decoder, stack = self._decoder, self._decoder.stack
        x = decoder.scale * decoder.embedding[token]
        x = x if asked.position is None else x + asked.position
        x = x if decoder.embedding_norm is None else decoder.embedding_norm(x)
        mass, result, reached = 0.0, torch.zeros_like(x), len(stack.schedule) - 1
        for depth in range(len(stack.schedule)):
            before, x = x, self._layer(row, depth, x)
            if decoder.halting.rule != "none":
                last = depth == len(stack.schedule) - 1
                x, mass, result, done = self._halt(before, x, mass, result, last)
                if done:
                    reached = depth
                    break
        for depth in range(reached + 1, len(stack.schedule)):  # later tokens read those of the last state
            self._past[row][depth].append(self._qkv(depth, x)[1:])
        if decoder.halting.rule == "ut_act" and mass > 0:
            x = result
        return x

    def _words(self, states):
        """Logits of states behind the last depth, ... x C -> ... x V."""
        last, kind = self._decoder.stack.last, Int8Map if self._decoder.small_words else Map
        return kind(self._decoder.words, None)(states if last is None else last(states))

    def _qkv(self, depth, x):
        layer = self._decoder.stack.layers[self._decoder.stack.schedule[depth]]
        return layer.qkv(self._decoder.stack.before(layer.norms[0], x)).chunk(3)

    def _layer(self, row, depth, x):
        stack, number = self._decoder.stack, self._decoder.stack.schedule[depth]
        layer, past = stack.layers[number], self._past[row][depth]
        query, *new = self._qkv(depth, x)
        past.append(new)
        y = stack.attend(query, *(torch.stack(each) for each in zip(*past)))
        x = stack.behind(layer.norms[0], stack.add(layer.merge(y), x, depth, 0))
        if self._source:
            query = layer.query(stack.before(layer.norms[1], x))
            y = stack.attend(query, *self._source[number][self._sentence[row]])
            x = stack.behind(layer.norms[1], stack.add(layer.merge_source(y), x, depth, 1))
        return stack.feed_forward(layer, x, depth)

    def _halt(self, x, y, mass, result, last):
        """The rules of :mod:`fairseq_adaptive.modules.policies`, of one token: state, what is carried, and whether it is
        done."""
        rule, threshold, weight, bias = self._decoder.halting
        if rule == "saturation":
            return y, mass, result, last or bool(F.cosine_similarity(x, y, dim=0) >= threshold)
        if rule == "margin":
            best = self._words(y).softmax(-1).topk(2).values
            return y, mass, result, last or bool(best[0] - best[1] >= threshold)
        p = float(((x if rule == "ut_act" else y) @ weight + bias).sigmoid())
        if rule == "pondernet":
            mass = 1.0 if last else 1 - (1 - mass) * (1 - p)
            return y, mass, result, last or mass >= threshold
        done = mass + p > threshold
        share = 1 - mass if done else p
        mixed = share * y + (1 - share) * (x if rule == "act" else result)
        return (mixed, mass + share, result, last or done) if rule == "act" else (y, mass + share, mixed, last or done)

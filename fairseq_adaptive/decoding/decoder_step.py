"""The decoder in beam search, one step at a time.

The hypotheses of a sentence share one cache: a step adds a slot for the token of each hypothesis, and a mask says which
slots a hypothesis descends from. When hypotheses are swapped, dropped or repeated, the mask is reordered and keys and
values stay where they are.
"""

from typing import Callable, Dict, List, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from fairseq.modules import FairseqDropout
from torch import Tensor, nn

from fairseq_adaptive.modules.layers.attention import FastAttention
from fairseq_adaptive.modules.layers.depth_lora import DEPTH_MODULES, layers_to_lay_out, prepacked_at, weight_and_bias
from fairseq_adaptive.modules.layers.dropout import FastDropout
from fairseq_adaptive.modules.layers.int8_linear import Int8Linear, project
from fairseq_adaptive.modules.layers.known import first_change, say_once
from fairseq_adaptive.modules.layers.prepacked_linear import LINEARS, PrepackedWeights
from fairseq_adaptive.modules.layers.residual import FUSABLE
from fairseq_adaptive.modules.layers.transformer_layer import DecoderLayer
from fairseq_adaptive.modules.stack.decoder_stack import DecoderStack
from fairseq_adaptive.modules.stack.run import run_packed

MAPS = (*LINEARS, Int8Linear)
KNOWN = (DecoderStack, DecoderLayer, FastAttention, *MAPS, FairseqDropout, FastDropout, *FUSABLE, *DEPTH_MODULES)
_BLOCK = 16  # keys come in whole blocks: a softmax over an odd number of them costs a CPU several times as much


def _norm(norm: nn.Module, depth: int) -> Tuple:
    return norm.normalized_shape, *weight_and_bias(norm, depth), norm.eps


def _map(linear: nn.Module, depth: int) -> Callable:
    return linear if type(linear) is Int8Linear else prepacked_at(linear, depth)


def _joint(linears: List[nn.Module], depth: int) -> Callable:
    """Several maps of one input side by side."""
    if any(type(each) is Int8Linear for each in linears):
        return lambda x: torch.cat(project(x, *linears), -1)
    parts = [prepacked_at(each, depth) for each in linears]
    bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts])
    return PrepackedWeights(torch.cat([part.weight for part in parts]), bias)


class _Layer(NamedTuple):
    """What a step needs of a layer at a depth, without calls of modules: these cost more than the arithmetic at batch
    size 1."""

    pre_norm: bool
    norms: Tuple  # arguments of layer_norm after x: of self-attention, cross-attention (or None), feed-forward
    project: Callable  # C -> 3 C
    out: Callable
    query_source: Optional[Callable]
    out_source: Optional[Callable]
    fc1: Callable
    fc2: Callable
    activation: Callable

    @classmethod
    def of(cls, layer, depth):
        own, source = layer.self_attn, layer.encoder_attn
        return cls(
            layer.normalize_before,
            (
                _norm(layer.self_attn_layer_norm, depth),
                None if source is None else _norm(layer.encoder_attn_layer_norm, depth),
                _norm(layer.final_layer_norm, depth),
            ),
            _joint([own.q_proj, own.k_proj, own.v_proj], depth),
            _map(own.out_proj, depth),
            None if source is None else _map(source.q_proj, depth),
            None if source is None else _map(source.out_proj, depth),
            _map(layer.fc1, depth),
            _map(layer.fc2, depth),
            layer.activation_fn,
        )


class DecoderStep:
    """The caches of one search, and the stack over the newest tokens.

    Keys and values of the source are computed once for every layer, whatever depths it serves, and once for every
    sentence, whatever the beam. A layer that differs from depth to depth counts as one for each of them.

    Args:
        stack: a :class:`~fairseq_adaptive.modules.DecoderStack` that :meth:`fits`
        beam: hypotheses of a sentence after the first step, which has one
    """

    def __init__(self, stack, beam: int):
        self._stack, self._beam = stack, beam
        self._used = self._block = 0  # slots with a token, and in whole blocks
        self.steps = 0  # that were taken
        self._rows = 1  # hypotheses of a sentence
        self.schedule: List[int] = []  # for each depth the number of its layer in what follows
        self._layers: List[_Layer] = []
        self._source: Dict[int, Tuple[Tensor, Tensor]] = {}  # G x D x S, G x S x D; G = B H
        # 2 N x B x H x S x D; K x B x Q x S, K is N where some tokens are hidden at some depths, or 1; G x 1 x S
        self._cache = self._seen = self._source_mask = None

    @staticmethod
    def fits(stack) -> bool:
        """Whether the layers are plain enough, and nobody wants to know where tokens halt."""
        if stack.kv != "recompute" or stack.recorder is not None or stack.training:
            return False
        layers = [stack.layer(number) for number in range(stack.unique_layers)]
        why = first_change((stack, *(each for layer in layers for each in layer.modules())), KNOWN)
        if why is not None:
            say_once("beam search", why)
        return why is None and all(map(plain, layers))

    def _start(self, x: Tensor, encoder_out: Optional[Tensor], padding_mask: Optional[Tensor]):
        attention, depths, sentences = self._stack[0].self_attn, len(self._stack), x.size(0)
        self._size = attention.num_heads, attention.head_dim
        room = _BLOCK * self._beam
        self._cache = x.new_empty(2 * depths, sentences, self._size[0], room, self._size[1])
        self._seen = x.new_full((depths if self._stack.hides else 1, sentences, 1, room), float("-inf"))
        layers, self.schedule = layers_to_lay_out(self._stack)
        self._layers = [_Layer.of(*each) for each in layers]
        for number, (layer, depth) in enumerate(layers):
            if layer.encoder_attn is not None and encoder_out is not None:
                each = (layer.encoder_attn.k_proj, layer.encoder_attn.v_proj)
                with layer.running_at(depth):
                    keys, values = (self._source_heads(linear(encoder_out)) for linear in each)
                self._source[number] = keys.transpose(1, 2), values
        if encoder_out is not None:
            mask = x.new_zeros(sentences, 1, 1, encoder_out.size(0))
            if padding_mask is not None:
                mask.masked_fill_(padding_mask.bool()[:, None, None], float("-inf"))
            mask = F.pad(mask, (0, -mask.size(-1) % _BLOCK), value=float("-inf"))
            self._source_mask = mask.expand(-1, self._size[0], -1, -1).flatten(0, 1)

    def _source_heads(self, x):
        """S x B x C -> G x S' x D"""
        x = F.pad(x, (0, 0, 0, 0, 0, -x.size(0) % _BLOCK))
        return x.unflatten(-1, self._size).permute(1, 2, 0, 3).flatten(0, 1)

    def _advance(self, padding):
        """Make room for the tokens of a step; return what is seen of them, the masks, where depths write, and the keys
        and values that they read."""
        start, end = self._used, self._used + self._rows
        if end > self._seen.size(-1):
            room = self._seen.size(-1)
            self._cache = F.pad(self._cache, (0, 0, 0, room))
            self._seen = F.pad(self._seen, (0, room), value=float("-inf"))
        own = self._seen[..., start:end].diagonal(dim1=2, dim2=3)  # K x B x Q
        own.fill_(0)
        if padding is not None:
            own.masked_fill_(padding.view(own.shape[1:]), float("-inf"))
        seen = end + -end % _BLOCK
        if seen > self._block:  # what nothing sees still meets a weight of zero
            self._cache[:, :, :, self._block : seen] = 0
        self._used, self._block = end, seen
        masks = [each[:, None, :, :seen].expand(-1, self._size[0], -1, -1).flatten(0, 1) for each in self._seen]
        written = self._cache[:, :, :, start:end].unflatten(0, (-1, 2)).unbind(0)
        read = self._cache.flatten(1, 2)[:, :, :seen]
        return own, masks, written, read[::2].transpose(2, 3).unbind(0), read[1::2].unbind(0)

    def __call__(self, x: Tensor, encoder_out=None, padding_mask=None, padding=None) -> Tensor:
        """Run all depths.

        Args:
            x: (B Q) x C, embedded tokens of B sentences; Q is 1 in the first step, and then the beam
            encoder_out, padding_mask: S x B x C and B x S, true at padding; read in the first step
            padding: (B Q) x 1, true where the new token is padding, which nothing may see

        Returns:
            (B Q) x C
        """
        if self._cache is None:
            self._start(x, encoder_out, padding_mask)
        own, masks, *cache = self._advance(padding)
        self.steps += 1
        if self._stack.adaptive:
            return run_packed(self._stack, _StepContext(self, x, own, masks, *cache))
        for depth, where in enumerate(zip(*cache)):
            x = self.layer(x, depth, masks[0], *where)
        return x

    def _heads(self, x, parts):
        """(B Q) x (parts C) -> parts x B x H x Q x D"""
        return x.view(-1, self._rows, parts, *self._size).permute(2, 0, 3, 1, 4)

    def keys_and_values(self, x: Tensor, number: int) -> Tensor:
        """Of states (B Q) x C that a layer reads, 2 x B x H x Q x D."""
        layer = self._layers[number]
        y = torch.layer_norm(x, *layer.norms[0]) if layer.pre_norm else x
        # a weight of zero does not hide a NaN: a hypothesis that broke down must not reach its siblings
        return torch.nan_to_num(self._heads(layer.project(y), 3)[1:], 0.0, 0.0, 0.0).to(x.dtype)

    def layer(self, x, depth, mask, written, keys, values, places=None):
        """P x C -> P x C, of the hypotheses at some places; None: of all."""
        number, add, sublayer = self.schedule[depth], self._stack.residual, 0
        layer = self._layers[number]

        def spread(x):
            return x if places is None else x.new_zeros(count, x.size(1)).index_copy_(0, places, x)

        def gather(x):
            return x if places is None else x.index_select(0, places)

        count = self._seen.size(1) * self._rows
        for kind, norm in enumerate(layer.norms):
            if kind == 1 and number not in self._source:
                continue
            y = torch.layer_norm(x, *norm) if layer.pre_norm else x
            if kind == 0:
                new = self._heads(spread(layer.project(y).to(x.dtype)), 3)  # autocast may have changed it
                torch.nan_to_num(new[1:], 0.0, 0.0, 0.0, out=written)  # as in keys_and_values
                y = layer.out(gather(self._attend(new[0], keys, values, mask)))
            elif kind == 1:
                queries = self._heads(spread(layer.query_source(y)), 1)[0]
                y = layer.out_source(gather(self._attend(queries, *self._source[number], self._source_mask)))
            else:
                y = layer.fc2(layer.activation(layer.fc1(y)))
            x = x + y if add is None else add(y, x, depth, sublayer, None)
            if not layer.pre_norm:
                x = torch.layer_norm(x, *norm)
            sublayer += 1
        return x

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """B x H x Q x D over G x D x S and G x S x D; ``mask``, G x (1 or Q) x S, is added. -> (B Q) x C"""
        heads, dim = self._size
        queries = queries.reshape(-1, self._rows, dim)
        scores = torch.baddbmm(mask, queries, keys, alpha=dim**-0.5)
        if scores.dtype == torch.float32:
            weights = scores.softmax(-1)
        else:
            weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(scores.dtype)
        out = torch.bmm(weights, values).view(-1, heads, self._rows, dim)
        return out.transpose(1, 2).reshape(-1, heads * dim)

    def reorder(self, order: Tensor):
        """Go on with other hypotheses.

        Args:
            order: B' x beam in one row, numbers of hypotheses so far; those of a sentence descend from one sentence
        """
        kept = order.view(-1, self._beam)[:, 0].div(self._rows, rounding_mode="floor").tolist()
        if kept != list(range(self._seen.size(1))):
            self._keep(kept)
        self._seen = self._seen.flatten(1, 2).index_select(1, order).unflatten(1, (-1, self._beam))
        self._rows = self._beam

    def _keep(self, sentences: List[int]):
        index = torch.tensor(sentences, device=self._cache.device)
        if all(first < second for first, second in zip(sentences, sentences[1:])):
            # in place: memory that the system has yet to map costs more than the copy
            for to, number in enumerate(sentences):
                if to != number:
                    self._cache[:, to, :, : self._block] = self._cache[:, number, :, : self._block]
            self._cache = self._cache[:, : len(sentences)]
        else:
            self._cache = self._cache.index_select(1, index)

        def select(x):
            return x.unflatten(0, (-1, self._size[0])).index_select(0, index).flatten(0, 1)

        self._source = {number: (select(keys), select(values)) for number, (keys, values) in self._source.items()}
        self._source_mask = None if self._source_mask is None else select(self._source_mask)


class _StepContext:
    """Of a step in which policies say who is computed: hypotheses are sequences of one token.

    Later tokens read keys and values of all depths: those that a token has not reached are those of its last state,
    made once for every layer at the end.
    """

    causal, reading, tape_len, remembers = True, None, 0, True

    def __init__(self, step: DecoderStep, x: Tensor, own, masks, written, keys, values):
        self._step, self._own, self._masks, self._cache = step, own, masks, (written, keys, values)
        self.states, self.tokens = x, torch.ones(len(x), 1, dtype=torch.bool, device=x.device)
        self._visible, self._made = None, {}  # B Q, None: all; which places have keys of a depth, None: all

    def sentence(self, places):
        return places

    def position(self, stack, places):
        return torch.full_like(places, self._step.steps - 1)

    def reads_at(self, depth):
        return False

    reads_after = reads_at

    def call(self, stack, depth, x, places):
        places = None if len(places) == len(self.states) else places
        mask, where = self._masks[depth if stack.hides else 0], [each[depth] for each in self._cache]
        self._made[depth] = places
        self._show(depth)
        x = self._step.layer(x, depth, mask, *where, places)
        if places is not None and self._passes_by(stack):
            self._fill(stack, depth, {})
        return x

    def _passes_by(self, stack):
        """Whether tokens that are not computed are seen as they are, and go on: at the end their state is another."""
        return stack.router is not None and not stack.router.monotone and stack.router_kv == "recompute"

    def changed(self, places, state):
        self.states = state if len(state) == len(self.states) else self.states.index_copy(0, places, state)

    def done(self, places):
        """Seen with its last state."""

    def hide(self, places):
        self._visible = torch.ones_like(self.tokens[:, 0]) if self._visible is None else self._visible.clone()
        self._visible[places] = False

    def show(self, places):
        self._visible[places] = True

    def _show(self, depth):
        if self._visible is not None:
            self._own[depth].masked_fill_(~self._visible.view(self._own.shape[1:]), float("-inf"))

    def skip(self, stack, depth):
        self._made[depth] = self.tokens.new_zeros(0, dtype=torch.long)
        self._cache[0][depth].zero_()
        self._show(depth)
        if self._passes_by(stack):
            self._fill(stack, depth, {})

    def _fill(self, stack, depth, made):
        """Write the keys and values that a depth lacks, of the states as they are."""
        number, written = self._step.schedule[depth], self._cache[0][depth]
        places = self._made.get(depth, self.tokens.new_zeros(0, dtype=torch.long))
        if places is None:
            return
        if number not in made:
            made[number] = self._step.keys_and_values(self.states, number)
        there = torch.zeros_like(self.tokens[:, 0]).index_fill_(0, places, True).view(1, -1, 1, written.size(-2), 1)
        written.copy_(torch.where(there, written, made[number]))
        self._made[depth] = None

    def finish(self, stack, result):
        made = {}
        for depth in range(len(stack)):
            if depth not in self._made:
                self._show(depth)
            self._fill(stack, depth, made)
        return result


def plain(layer) -> bool:
    """Whether none of fairseq's further options of a layer, of an encoder or a decoder, is in use."""
    attentions = [each for each in (layer.self_attn, getattr(layer, "encoder_attn", None)) if each is not None]
    return not (
        getattr(layer, "cross_self_attention", False)
        or any(getattr(layer, name, None) is not None for name in ("c_attn", "attn_ln", "ffn_layernorm", "w_resid"))
        or any(each.use_xformers or each.add_zero_attn or each.bias_k is not None for each in attentions)
        or any(each.apply_during_inference for each in layer.modules() if isinstance(each, FairseqDropout))
    )

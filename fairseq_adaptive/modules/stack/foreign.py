"""Layers of other libraries at the depths of a stack: whatever maps states and a padding mask to states.

Such a layer cannot be told which of its keys to hide. It is called on the tokens that are seen, gathered at the front of
each sentence and padded; what it makes of those that are not computed is thrown away.
"""

import inspect
from typing import Callable, Iterable, Optional, Sequence, Union

import torch
from torch import Tensor, nn

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules.layers.zero_gradients import zero_gradients
from fairseq_adaptive.modules.policies import Halting, Place, Reader, Router, build_policy
from fairseq_adaptive.modules.stack.context import ALL, Context
from fairseq_adaptive.modules.stack.packed_context import PackedContext
from fairseq_adaptive.modules.stack.packing import Groups
from fairseq_adaptive.modules.stack.stack import LayerStack


def call_torch(layer: nn.Module, x: Tensor, padding_mask: Optional[Tensor], mask: Optional[Tensor] = None) -> Tensor:
    """Run an ``nn.TransformerEncoderLayer``, or what is called as it is; arguments of :class:`ForeignStack`'s ``call``."""
    first = layer.self_attn.batch_first
    if mask is not None and mask.dim() == 3:
        mask = mask.repeat_interleave(layer.self_attn.num_heads, 0)
    out = layer(x if first else x.transpose(0, 1), mask, padding_mask)
    return out if first else out.transpose(0, 1)


def call_hugging_face(
    layer: nn.Module, x: Tensor, padding_mask: Optional[Tensor], mask: Optional[Tensor] = None
) -> Tensor:
    """Run an encoder layer of transformers, with a mask that is added to the scores."""
    added, hidden = None, torch.finfo(x.dtype).min
    if mask is not None:
        mask = (mask if mask.dim() == 3 else mask[None])[:, None]  # [1 or B, 1, T, T]
        added = x.new_zeros(mask.shape).masked_fill(mask, hidden) if mask.dtype == torch.bool else mask.to(x)
    if padding_mask is not None:
        padding = padding_mask[:, None, None]
        added = x.new_zeros(padding.shape) if added is None else added
        added = torch.where(padding, torch.full_like(added, hidden), added)
    out = layer(x, attention_mask=added)
    return out[0] if isinstance(out, tuple) else out


_CALLS = {"src_key_padding_mask": call_torch, "attention_mask": call_hugging_face}


class ForeignContext(Context):
    """All places of a dense run, T x B x C.

    Args:
        x, padding_mask, tape_len: of :class:`Context`
        mask: T x T, true (or -inf) where the query of a row must not see the key of a column
    """

    def __init__(self, x, padding_mask, tape_len=0, mask: Optional[Tensor] = None):
        super().__init__(x, padding_mask, tape_len)
        self.mask, self.causal = mask, mask is not None

    def call(self, stack, depth, x, shown=ALL):
        x = x.transpose(0, 1)
        if shown.visible is None:
            return stack.run_layer(depth, x, self.padding_mask, self.mask).transpose(0, 1), None
        places = ((shown.visible.t() > 0) & self.tokens).flatten().nonzero().squeeze(1)
        if not places.numel():
            return zero_gradients(x, stack[depth]).transpose(0, 1), None
        rows = x.flatten(0, 1)
        out = _run_some(stack, depth, rows.index_select(0, places), places, self.tokens.shape, self.mask)
        return rows.index_copy(0, places, out.to(rows.dtype)).unflatten(0, x.shape[:2]).transpose(0, 1), None

    def _with_tape(self, stack, x, padding_mask, read):
        return ForeignContext(x, padding_mask, read.live.size(1), self.mask)


class PackedForeign(PackedContext):
    """Running tokens. Sentences of which none runs are left out, and tokens that nobody sees; those that the others see
    as they were are computed, and stay as they were."""

    def __init__(self, x, padding_mask, tape_len=0, reading=None, mask: Optional[Tensor] = None):
        super().__init__(x, padding_mask, mask is not None, tape_len=tape_len, reading=reading)
        self.mask = mask

    def call(self, stack, depth, x, places):
        sentence = torch.zeros_like(self.tokens[:, 0])
        sentence[self.sentence(places)] = True
        seen = (self.visible & sentence[:, None]).flatten().nonzero().squeeze(1)
        if seen.numel() == places.numel():
            return _run_some(stack, depth, x, places, self.tokens.shape, self.mask)
        out = _run_some(stack, depth, self.states.index_select(0, seen), seen, self.tokens.shape, self.mask)
        return out.index_select(0, torch.searchsorted(seen, places))


def _run_some(stack, depth: int, rows: Tensor, places: Tensor, shape, mask: Optional[Tensor]) -> Tensor:
    """Run a layer on the tokens at some places of B x T, P x C, each sentence's at its front."""
    batch, length = shape
    groups = Groups(places.div(length, rounding_mode="floor"), batch)
    padding = ~groups.pad(torch.ones_like(places, dtype=torch.bool))
    if mask is not None:
        place = groups.pad(places % length)
        place = torch.where(padding, place.amax(1, keepdim=True), place)  # where something is seen: no NaN
        mask = mask[place[:, :, None], place[:, None, :]]
    x = stack.run_layer(depth, groups.pad(rows), padding if padding.any() else None, mask)
    return groups.unpad(x)


class ForeignStack(LayerStack):
    """Layers of any library at the depths of a schedule, under policies; batch first.

    A layer maps states, [B, T, C], and a padding mask, [B, T] and true at padding, to states. It must not mix the
    sentences of a batch, nor read padding; both are tried when the stack is made. Tokens that are left out are taken
    out of what it gets: a layer that numbers its tokens (rotary positions, distances) counts those that are left.

    In evaluation without gradients, sentences of which no token runs are not computed, nor tokens that nobody sees:
    ``halting_kv="active"`` saves what halting can save. Under ``recompute`` a token that is done is computed while others
    of its sentence run, since no layer of another library says what its keys would be. In training, a token that is
    left out gives no gradient to the router's choice, except by its price.

    Args:
        layers: the M unique layers
        dim: C
        schedule: for each depth the number of its layer (default: each once)
        call: ``call(layer, x, padding_mask) -> x``, how to run a layer, [B, T, C] to [B, T, C]; ``padding_mask`` may be
            None. A fourth argument is the ``mask`` of :meth:`forward`, where it is given one. Default: by the names
            that the layer's ``forward`` has, that of torch (``src_key_padding_mask``) or that of transformers
            (``attention_mask``)
        halting, router, reader: policies, or their names
        heads: for policies that ask for them
        router_kv, halting_kv: ``active`` or ``recompute``, see :mod:`~fairseq_adaptive.modules.policies.pairing`

    Raises:
        UsageError: for a layer that is called in another way or breaks this contract, and of :class:`LayerStack`

    Example::

        layers = [BertLayer(config) for _ in range(12)]
        stack = ForeignStack(layers, config.hidden_size, router="skimming", halting="act")
        states = stack(x, padding_mask)
    """

    def __init__(
        self,
        layers: Iterable[nn.Module],
        dim: int,
        schedule: Optional[Sequence[int]] = None,
        call: Optional[Callable] = None,
        halting: Union[Halting, str, None] = None,
        router: Union[Router, str, None] = None,
        reader: Union[Reader, str, None] = None,
        heads: int = 1,
        router_kv: Optional[str] = None,
        halting_kv: Optional[str] = None,
    ):
        layers = list(layers)
        schedule = tuple(range(len(layers)) if schedule is None else schedule)
        place = Place(dim, len(schedule), heads=heads, schedule=schedule)
        halting, router, reader = (
            build_policy(kind, policy, place) if isinstance(policy, str) else policy
            for kind, policy in (("halting", halting), ("router", router), ("reader", reader))
        )
        super().__init__(layers, schedule, halting=halting, router=router, router_kv=router_kv, halting_kv=halting_kv)
        if self.kv != "recompute":
            raise UsageError(
                f"{self.kv} keeps keys and values, which layers of other libraries do not show: choose active "
                "or recompute"
            )
        self.check_reader(reader)
        self.reader, self._calls = reader, [call or _call_of(layer) for layer in layers]
        for layer, each in zip(layers, self._calls):
            _try(layer, each, dim)

    changed = None  # layers are called as they are
    resizable = False  # each layer has a call
    unmergeable = "layers of other libraries cannot be told how much a key weighs; choose another router"

    def check_layers(self):
        """What a layer needs here is tried."""

    def run_layer(self, depth: int, x: Tensor, padding_mask: Optional[Tensor], mask: Optional[Tensor] = None) -> Tensor:
        """[B, T, C] -> [B, T, C]"""
        rest = () if mask is None else (mask,)
        return self._calls[self.schedule[depth]](self[depth], x, padding_mask, *rest)

    def forward(
        self,
        x: Tensor,
        padding_mask: Optional[Tensor] = None,
        mask: Optional[Tensor] = None,
        protected: Optional[Tensor] = None,
        bank: Optional[Tensor] = None,
        bank_padding_mask: Optional[Tensor] = None,
    ):
        """
        Args:
            x: [B, T, C]
            padding_mask: [B, T], true at padding
            mask: [T, T], true (or -inf) where the query of a row must not see the key of a column; then a router's
                choices are causal
            protected: [B, T], true at tokens that a router must not leave out
            bank, bank_padding_mask: what the reader reads, of :meth:`LayerStack.forward`

        Returns:
            [B, T, C]; with a reader [B, T + S, C], the padding mask [B, T + S], and what was read

        Raises:
            UsageError: for a reader and a ``mask``: what is read depends on all tokens
        """
        if self.reader is not None and mask is not None:
            raise UsageError("a reader reads all tokens, which a mask would hide from some: leave one of them out")
        out = self._run(
            x.transpose(0, 1),
            padding_mask,
            protected,
            reader=self.reader,
            bank=bank,
            bank_padding_mask=bank_padding_mask,
            dense=lambda x, padding_mask, tape_len, read: ForeignContext(x, padding_mask, tape_len, mask),
            packed=lambda x, padding_mask, tape_len, reading: PackedForeign(x, padding_mask, tape_len, reading, mask),
        )
        return out.transpose(0, 1) if self.reader is None else (out[0].transpose(0, 1), *out[1:])


def _call_of(layer: nn.Module) -> Callable:
    names = inspect.signature(layer.forward).parameters
    for name, call in _CALLS.items():
        if name in names:
            return call
    raise UsageError(
        f"{type(layer).__name__} takes neither {' nor '.join(_CALLS)}: say how to run it on states [B, T, C] and a padding "
        "mask [B, T], true at padding: call=lambda layer, x, padding_mask: ..."
    )


@torch.no_grad()
def _try(layer: nn.Module, call: Callable, dim: int):
    """Refuse a layer that changes the shape of states, mixes the sentences of a batch, or reads padding."""
    like = next((each for each in layer.parameters() if each.is_floating_point()), torch.zeros(()))
    if like.is_meta:
        return
    name, modes = type(layer).__name__, [(each, each.training) for each in layer.modules()]
    x = torch.randn(2, 5, dim, generator=torch.Generator().manual_seed(1)).to(like)
    padding = torch.zeros(2, 5, dtype=torch.bool, device=x.device)
    padding[0, 3:] = True
    try:
        layer.eval()
        both, other = call(layer, x, padding), call(layer, x.flip(0), padding.flip(0))
        changed = call(layer, x.masked_fill(padding[..., None], 2.0), padding)
        alone = [call(layer, x[:1, :3], None), call(layer, x[1:], None)]
    except (TypeError, AttributeError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(
            f"{name} does not run on states [B, T, {dim}] and a padding mask [B, T]: {reason}; give call=, or "
            "another width"
        ) from error
    finally:
        for module, mode in modes:
            module.training = mode
    if not isinstance(both, Tensor) or both.shape != x.shape:
        found = tuple(both.shape) if isinstance(both, Tensor) else type(both).__name__
        raise UsageError(
            f"{name} makes {found} of states {tuple(x.shape)}: it must give states of the same shape; give call="
        )
    least = 1e-2 if x.dtype.itemsize < 4 else 1e-4

    def differs(one, other):
        return not torch.allclose(one, other, rtol=least, atol=least * float(both[~padding].abs().amax()))

    if differs(both[0, :3], changed[0, :3]):
        raise UsageError(
            f"{name} reads padding: a token that is left out must not be seen; give call=, or another layer"
        )
    if differs(both[1], alone[1][0]) or differs(both[0, :3], alone[0][0]) or differs(both, other.flip(0)):
        raise UsageError(
            f"{name} mixes the sentences of a batch, or places padding otherwise than its mask says: each "
            "must have what it has alone; give call=, or another layer"
        )

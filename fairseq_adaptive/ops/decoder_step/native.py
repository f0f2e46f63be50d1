"""``naive.py`` in C, for float32 on a CPU: matrices laid out in panels, and one call a step."""

import ctypes
import functools
import time
from concurrent.futures import ThreadPoolExecutor
from ctypes import POINTER, Structure, byref, c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_adaptive.ops import matmul, native
from fairseq_adaptive.ops.decoder_step import naive
from fairseq_adaptive.ops.decoder_step.naive import RULES, Asked

SOURCE = Path(__file__).with_name("native.c")
_FAR = -1e30  # the logit of what pads the words
_LARGE = 2**24  # multiplications of a product from which on it matters who is faster
_MOST_ROWS = 512  # more are no faster
_GAIN = 1.2  # of a step with products as fast as torch's over torch's, at width 512 and batch 64


def _structure(name, **fields):
    """A structure of the C file: its fields in their order."""
    return type(name, (Structure,), {"_fields_": list(fields.items())})


_Map = _structure("Map", panels=c_void_p, bias=c_void_p, inner=c_int32, outer=c_int32)
_Norm = _structure("Norm", gain=c_void_p, bias=c_void_p, eps=c_float)
_MAPS = ("qkv", "merge", "query", "source", "merge_source", "up", "down")
_Layer = _structure("Layer", norms=_Norm * 3, **dict.fromkeys(_MAPS, _Map))
_SIZES = "real width heads head hidden depths sublayers pre_norm gelu cross".split()
_Stack = _structure(
    "Stack",
    **dict.fromkeys(_SIZES, c_int32),
    scale=c_float,
    schedule=c_void_p,
    layers=POINTER(_Layer),
    omega=c_void_p,
    last=_Norm,
)
_Decoder = _structure(
    "Decoder",
    stack=_Stack,
    embedding=c_void_p,
    embed_scale=c_float,
    embed_norm=_Norm,
    words=_Map,
    unit=c_void_p,
    unit_bias=c_float,
    threshold=c_float,
    rule=c_int32,
    layers=c_int32,
    vocabulary=c_int32,
)
_Step = _structure(
    "Step",
    tokens=c_void_p,
    scores=c_void_p,
    position=c_void_p,
    rows=c_int64,
    count=c_int64,
    only=c_int64,
    changes=c_int64,
    changed=c_void_p,
    change=c_void_p,
    heat=c_float,
    best=c_void_p,
    words=c_void_p,
    origin=c_void_p,
)
_Round = _structure(
    "Round",
    **dict.fromkeys("exit width limit room least most end drafted changes short_changes".split(), c_int64),
    **dict.fromkeys("changed short_changed change short_change positions".split(), c_void_p),
    heat=c_float,
    **dict.fromkeys("sentence place newest score rows got rounds tried given words scores".split(), c_void_p),
)
_SIGNATURES = {
    "lanes": (c_int32,),
    "panel_width": (c_int32,),
    "group_width": (c_int32,),
    "packed_size": (c_int64, c_int64, c_int64),
    "pack": (None, c_void_p, c_int64, c_int64, c_void_p),
    "linear": (None, POINTER(_Map), c_void_p, c_int64, c_void_p),
    "encode": (c_int32, POINTER(_Stack), c_void_p, c_void_p, c_int64),
    "search_open": (c_void_p, POINTER(_Decoder), c_void_p, c_int64),
    "search_close": (None, c_void_p),
    "search_source": (None, c_void_p, c_void_p, c_int64, c_int64),
    "search_turn": (c_int32, c_void_p, c_void_p, c_int64),
    "search_step": (c_int32, c_void_p, POINTER(_Step), c_int64, c_int64),
    "search_room": (c_int32, c_void_p, c_int64, c_int64),
    "search_rounds": (c_int32, c_void_p, POINTER(_Round), c_int64, c_int64),
}


@functools.cache
def library() -> ctypes.CDLL:
    """Return the library, built where it is not there, and checked by a product.

    Raises:
        native.Unavailable: where it cannot be built, or computes something else
    """
    built = native.build(SOURCE)
    for name, (result, *arguments) in _SIGNATURES.items():
        function = getattr(built, name)
        function.restype, function.argtypes = result, arguments
    generator = torch.Generator().manual_seed(1)
    x, weight, bias = (torch.randn(size, generator=generator) for size in ((13, 48), (80, 48), (80,)))
    found = linear(_Packing(built), weight, bias, x)
    if not torch.allclose(found, F.linear(x, weight, bias), rtol=1e-4, atol=1e-4):
        raise native.Unavailable("its test product is wrong")
    return built


def obstacle() -> Optional[str]:
    """Why the library is not there, in words, or None."""
    return native.obstacle(library)


@functools.cache
def speeds(width: int, hidden: int, rows: int, threads: int) -> Tuple[float, float]:
    """GFLOP/s of a product of this library and of torch's faster one, the best of three."""
    x, weight, bias = torch.ones(rows, width), torch.ones(hidden, width), torch.ones(hidden)
    packing = _Packing(library())
    packed, y = packing.map(weight, bias), x.new_empty(rows, hidden)
    share = max(1, rows // threads)  # each thread has its rows
    prepacked = matmul.Prepacked(weight, bias) if matmul.can_prepack(weight) else None

    def own():
        packing.library.linear(byref(packed), x.data_ptr(), share, y.data_ptr())

    def speed(product):
        product()
        times = []
        for _ in range(3):
            start = time.perf_counter()
            product()
            times.append(time.perf_counter() - start)
        return 2e-9 * rows * width * hidden / min(times)

    others = [lambda: F.linear(x, weight, bias), *([] if prepacked is None else [lambda: prepacked(x)])]
    return speed(own), max(map(speed, others))


def slower(width: int, hidden: int, rows: int) -> Optional[str]:
    """Why a step of so many rows is better left to torch, in words, or None; what matters is measured once a process.

    Small products are faster here by far, because a call costs nothing.
    """
    if width * hidden * rows < _LARGE:
        return None
    rows = min(1 << rows.bit_length() - 1, _MOST_ROWS)
    own, others = speeds(width, hidden, rows, torch.get_num_threads())
    if own * _GAIN >= others:
        return None
    return f"torch multiplies {rows} rows of {width} by {hidden} faster on this machine: {others:.0f} GFLOP/s for {own:.0f}"


def _up(size, unit):
    return -(-size // unit) * unit


def _padded(tensor, *amounts):
    """``F.pad``, which copies also where there is nothing to add."""
    return F.pad(tensor, amounts) if any(amounts) else tensor


def _address(tensor):
    return None if tensor is None else tensor.data_ptr()


class _Packing:
    """Lays weights out; keeps the tensors to which structures point."""

    def __init__(self, built):
        self.library, self.lanes, self.panel = built, built.lanes(), built.panel_width()
        self.kept: List = []

    def keep(self, tensor, *sizes):
        """A contiguous float32 copy, or the tensor itself, zero behind its end up to some sizes of the last dimensions."""
        pad = [amount for have, want in zip(reversed(tensor.shape), reversed(sizes)) for amount in (0, want - have)]
        self.kept.append(_padded(tensor, *pad).detach().contiguous())
        return self.kept[-1]

    def map(self, weight, bias, unit=None, fill=0.0):
        """O x I, where both are what is read and written, to a structure; ``unit``: O is rounded up to it."""
        outer, inner = weight.shape
        width = _up(outer, unit or self.lanes)
        weight = weight.detach().contiguous()
        panels, written = (self.library.packed_size(size, inner) for size in (width, outer))
        panels = weight.new_empty(panels)
        panels[written:] = 0
        self.library.pack(weight.data_ptr(), outer, inner, panels.data_ptr())
        biases = weight.new_full((_up(width, self.panel),), fill)
        biases[:outer] = 0 if bias is None else bias.detach()
        self.kept += [panels, biases]
        return _Map(panels.data_ptr(), biases.data_ptr(), inner, width)

    def norm(self, norm):
        if norm is None:
            return _Norm(None, None, 0)
        width = _up(len(norm.gain), self.lanes)
        return _Norm(self.keep(norm.gain, width).data_ptr(), self.keep(norm.bias, width).data_ptr(), norm.eps)

    def heads(self, each: naive.Map, parts, heads):
        """A map to heads, which are padded one by one."""
        weight = each.weight.unflatten(0, (parts * heads, -1))
        head = _up(weight.size(1), self.lanes)
        weight = _padded(weight, 0, -weight.size(2) % self.lanes, 0, head - weight.size(1))
        bias = each.bias
        if bias is not None:
            bias = bias.unflatten(0, (parts * heads, -1))
            bias = _padded(bias, 0, head - bias.size(1)).flatten()
        return self.map(weight.flatten(0, 1), bias)

    def merge(self, each: naive.Map, heads):
        """A map of heads."""
        weight = each.weight.unflatten(1, (heads, -1))
        weight = _padded(weight, 0, -weight.size(2) % self.lanes)
        return self.map(weight.flatten(1), each.bias)

    def plain(self, each: naive.Map):
        return self.map(_padded(each.weight, 0, -each.weight.size(1) % self.lanes), each.bias)

    def layer(self, layer: naive.Layer, heads):
        maps = {"qkv": self.heads(layer.qkv, 3, heads), "merge": self.merge(layer.merge, heads)}
        maps.update(up=self.plain(layer.up), down=self.plain(layer.down))
        if layer.source is not None:
            maps.update(query=self.heads(layer.query, 1, heads), source=self.heads(layer.source, 2, heads))
            maps["merge_source"] = self.merge(layer.merge_source, heads)
        return _Layer((_Norm * 3)(*map(self.norm, layer.norms)), *(maps.get(name, _Map()) for name in _MAPS))

    def stack(self, stack: naive.Stack):
        layers = (_Layer * len(stack.layers))(*(self.layer(each, stack.heads) for each in stack.layers))
        schedule = (c_int32 * len(stack.schedule))(*stack.schedule)
        self.kept += [layers, schedule]
        first = stack.layers[0]
        real, head = first.merge.weight.size(0), first.merge.weight.size(1) // stack.heads
        width, cross = _up(real, self.lanes), first.source is not None
        return _Stack(
            real=real,
            width=width,
            heads=stack.heads,
            head=_up(head, self.lanes),
            hidden=_up(first.up.weight.size(0), self.lanes),
            depths=len(schedule),
            sublayers=3 if cross else 2,
            pre_norm=stack.pre_norm,
            gelu=stack.activation == "gelu",
            cross=cross,
            scale=head**-0.5,
            schedule=ctypes.addressof(schedule),
            layers=ctypes.cast(layers, POINTER(_Layer)),
            omega=None if stack.omega is None else self.keep(stack.omega, width).data_ptr(),
            last=self.norm(stack.last),
        )


def linear(packing: _Packing, weight: Tensor, bias: Optional[Tensor], x: Tensor) -> Tensor:
    """N x I by O x I and O, where I and O are whole vectors: the product that all else is made of."""
    y = x.new_empty(len(x), len(weight))
    packing.library.linear(byref(packing.map(weight, bias)), x.data_ptr(), len(x), y.data_ptr())
    return y


class Packed:
    """A :class:`~naive.Stack` or a :class:`~naive.Decoder` laid out; weights are copied.

    Args:
        given: its layers have the same sizes; all is float32 on the CPU
    """

    def __init__(self, given):
        self.given, self.library = given, library()
        self._packing = packing = _Packing(self.library)
        stack = getattr(given, "stack", given)
        self.structure = packing.stack(stack)
        self.real, self.width = self.structure.real, self.structure.width
        if stack is given:
            return
        halting, group = given.halting, self.library.group_width()
        unit = None if halting.weight is None else packing.keep(halting.weight, self.width)
        words = _padded(given.words, 0, self.width - self.real)
        self.structure = _Decoder(
            stack=self.structure,
            embedding=packing.keep(given.embedding).data_ptr(),
            embed_scale=given.scale,
            embed_norm=packing.norm(given.embedding_norm),
            words=packing.map(words, None, group, _FAR),
            unit=_address(unit),
            unit_bias=halting.bias,
            threshold=halting.threshold,
            rule=RULES.index(halting.rule),
            layers=len(stack.layers),
            vocabulary=len(given.words),
        )


def _lengths(lengths):
    return (c_int64 * len(lengths))(*lengths)


def _done(status):
    if status:
        raise MemoryError("there is no memory for a step of the search")


class _Threads:
    """Splits what is done for sentences among threads: rows do not depend on each other."""

    def __init__(self, threads):
        self._threads, self._pool = threads, None

    def __call__(self, function, sentences):
        """``function(first, last)`` for all sentences."""
        parts = min(self._threads, sentences)
        if parts <= 1:
            return function(0, sentences)
        self._pool = self._pool or ThreadPoolExecutor(self._threads)
        bounds = [sentences * part // parts for part in range(parts + 1)]
        for each in [self._pool.submit(function, *pair) for pair in zip(bounds, bounds[1:])]:
            each.result()

    def close(self):
        if self._pool is not None:
            self._pool.shutdown()


def encode(stack: Packed, x: Tensor, lengths: List[int], threads: int = 1) -> Tensor:
    """As :func:`naive.encode`; ``threads`` share the sentences."""
    structure, lengths_ = stack.structure, _lengths(lengths)
    states = _padded(x, 0, stack.width - stack.real).contiguous()
    states = states.clone() if states.data_ptr() == x.data_ptr() else states
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)

    def some(first, last):
        at = states.data_ptr() + starts[first] * stack.width * states.element_size()
        where = ctypes.addressof(lengths_) + first * ctypes.sizeof(c_int64)
        _done(stack.library.encode(byref(structure), at, where, last - first))

    split = _Threads(threads)
    split(some, len(lengths))
    split.close()
    return states[:, : stack.real]


class Search:
    """As :class:`naive.Search`, of a :class:`Packed` decoder; to be closed.

    Args:
        threads: share the sentences
    """

    def __init__(self, decoder: Packed, lengths: List[int], states: Optional[Tensor] = None, threads: int = 1):
        self._decoder, self._library, self._handle = decoder, decoder.library, None
        self._split = _Threads(threads)
        self._changes = None, None
        if bool(decoder.structure.stack.cross) != (states is not None):
            raise ValueError("states of the source are what cross-attention reads: give them where there is one")
        handle = self._library.search_open(byref(decoder.structure), _lengths(lengths), len(lengths))
        if not handle:
            raise MemoryError("there is no memory for a search")
        self._handle = handle
        if states is not None:
            inner = decoder.structure.stack.layers[0].source.inner
            states = _padded(states, 0, inner - states.size(1)).contiguous()
            self._split(
                lambda first, last: self._library.search_source(handle, states.data_ptr(), first, last), len(lengths)
            )

    def step(self, asked: Asked) -> Tuple[Tensor, Tensor, Tensor]:
        """As :meth:`naive.Search.step`."""
        tokens, scores = asked.tokens.contiguous(), asked.scores.contiguous()
        order = None if asked.order is None else asked.order.contiguous()
        sentences = len(tokens) // asked.rows
        if order is None and not 0 <= int(tokens.min()) <= int(tokens.max()) < self._decoder.structure.vocabulary:
            raise IndexError(f"a first token is none of {self._decoder.structure.vocabulary} words")
        best = scores.new_empty(sentences, asked.count)
        words, rows = tokens.new_empty(2, sentences, asked.count)
        if self._changes[0] != asked.changes:
            changed = sorted(asked.changes)
            values = [asked.changes[word] for word in changed]
            self._changes = asked.changes, ((c_int64 * len(changed))(*changed), (c_float * len(changed))(*values))
        changed, change = self._changes[1]
        step = _Step(
            tokens.data_ptr(),
            scores.data_ptr(),
            _address(asked.position),
            asked.rows,
            asked.count,
            asked.only,
            len(changed),
            ctypes.addressof(changed),
            ctypes.addressof(change),
            asked.heat,
            best.data_ptr(),
            words.data_ptr(),
            rows.data_ptr(),
        )
        _done(self._library.search_turn(self._handle, _address(order), len(tokens)))
        self._split(
            lambda first, last: _done(self._library.search_step(self._handle, byref(step), first, last)), sentences
        )
        return best, words, rows

    def close(self):
        """Give the caches back."""
        handle, self._handle = self._handle, None
        if handle:
            self._library.search_close(handle)
        self._split.close()

    __del__ = close

"""``naive.py`` in C, for float32 on a CPU, and for maps of int8: matrices laid out in panels, and one call a step."""

import ctypes
import functools
import time
from concurrent.futures import ThreadPoolExecutor
from ctypes import byref, c_float, c_int64
from pathlib import Path
from typing import Callable, List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_adaptive.ops import matmul, native
from fairseq_adaptive.ops.decoder_step.naive import RULES, Asked
from fairseq_adaptive.ops.decoder_step.packing import Packing, address, check, padded
from fairseq_adaptive.ops.decoder_step.structures import SIGNATURES, Decoder, Step
from fairseq_adaptive.ops.int8_linear.eager import Int8Weights

SOURCE = Path(__file__).with_name("native.c")
_FAR = -1e30  # the logit of what pads the words
_LARGE = 2**24  # multiplications of a product from which on it matters who is faster
_MOST_ROWS = 512  # more are no faster
_GAIN = 1.2  # of a step with products as fast as torch's over torch's, at width 512 and batch 64


@functools.cache
def library() -> ctypes.CDLL:
    """Return the library, built where it is not there, and checked by a product.

    Raises:
        native.Unavailable: where it cannot be built, or computes something else
    """
    built = native.build(SOURCE)
    for name, (result, *arguments) in SIGNATURES.items():
        function = getattr(built, name)
        function.restype, function.argtypes = result, arguments
    check(built)
    return built


def obstacle() -> Optional[str]:
    """Why the library is not there, in words, or None."""
    return native.obstacle(library)


@functools.cache
def speeds(width: int, hidden: int, rows: int, threads: int, small: bool = False) -> Tuple[float, float]:
    """GFLOP/s of a product of this library and of torch's faster one, the best of three; ``small``: of int8."""
    x, weight, bias = torch.ones(rows, width), torch.ones(hidden, width), torch.ones(hidden)
    packing = Packing(library())
    packed = packing.small_map(weight, bias) if small else packing.map(weight, bias)
    y = x.new_empty(rows, packed.outer)  # whole vectors, which may be more than were asked for
    share = max(1, rows // threads)  # each thread has its rows

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

    return speed(own), max(speed(lambda each=each: each(x)) for each in torch_products(weight, bias, small))


def torch_products(weight: Tensor, bias: Tensor, small: bool) -> List[Callable]:
    """Those of torch with which a product is compared."""
    if small:
        return [Int8Weights(weight, bias)]
    others = [lambda x: F.linear(x, weight, bias)]
    return others + ([matmul.Prepacked(weight, bias)] if matmul.can_prepack(weight) else [])


def slower(width: int, hidden: int, rows: int, small: bool = False) -> Optional[str]:
    """Why a step of so many rows is better left to torch, in words, or None; what matters is measured once a process.

    Small products are faster here by far, because a call costs nothing.
    """
    if width * hidden * rows < _LARGE:
        return None
    rows = min(1 << rows.bit_length() - 1, _MOST_ROWS)
    own, others = speeds(width, hidden, rows, torch.get_num_threads(), small)
    if own * _GAIN >= others:
        return None
    return f"torch multiplies {rows} rows of {width} by {hidden} faster on this machine: {others:.0f} GFLOP/s for {own:.0f}"


class Packed:
    """A :class:`~naive.Stack` or a :class:`~naive.Decoder` laid out; weights are copied, but for the embedding of words.

    Args:
        given: its layers have the same sizes; all is float32 on the CPU
    """

    def __init__(self, given):
        self.given, self.library = given, library()
        self._packing = packing = Packing(self.library)
        stack = getattr(given, "stack", given)
        self.structure = packing.stack(stack)
        self.real, self.width = self.structure.real, self.structure.width
        if stack is given:
            return
        halting, group = given.halting, self.library.group_width()
        unit = None if halting.weight is None else packing.keep(halting.weight, self.width)
        embedding = given.embedding.detach().contiguous()  # the largest of all: read where it is
        packing.kept.append(embedding)
        words = padded(given.words, 0, self.width - self.real)
        self.structure = Decoder(
            stack=self.structure,
            embedding=embedding.data_ptr(),
            embed_scale=given.scale,
            embed_norm=packing.norm(given.embedding_norm),
            words=(packing.small_map if given.small_words else packing.map)(words, None, group, _FAR),
            unit=address(unit),
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
    states = padded(x, 0, stack.width - stack.real).contiguous()
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
            states = padded(states, 0, inner - states.size(1)).contiguous()
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
        step = Step(
            tokens.data_ptr(),
            scores.data_ptr(),
            address(asked.position),
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
        _done(self._library.search_turn(self._handle, address(order), len(tokens)))
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

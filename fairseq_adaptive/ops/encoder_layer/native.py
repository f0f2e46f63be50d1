"""``naive.py`` in C, for float32 on a CPU, and for maps of int8: matrices laid out in panels, and one call a layer."""

import ctypes
import functools
import time
from ctypes import POINTER, byref, c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Optional, Sequence, Tuple

import torch
from torch import Tensor

from fairseq_adaptive.ops import native
from fairseq_adaptive.ops.decoder_step import naive as steps
from fairseq_adaptive.ops.decoder_step.native import torch_products
from fairseq_adaptive.ops.decoder_step.packing import Packing, check, padded, round_up
from fairseq_adaptive.ops.decoder_step.structures import SIGNATURES as SHARED
from fairseq_adaptive.ops.decoder_step.structures import Map, Norm, Stack, structure
from fairseq_adaptive.ops.encoder_layer import naive

SOURCE = Path(__file__).with_name("native.c")
Predictor = structure(
    "Predictor", first=Norm, second=Norm, map=Map, score=c_void_p, bias=c_float * 2, real=c_int32, width=c_int32
)
_SHARED = "lanes panel_width group_width packed_size pack linear small_depth small_widest".split()
_LARGE = 2**24  # multiplications of a product from which on it matters who is faster
_MOST_ROWS = 512  # more are no faster
_WRONG = 2  # what C returns where lengths are not those of the rows
_GAIN = 1.2  # of a layer with products as fast as torch's over torch's
SIGNATURES = {
    **{name: SHARED[name] for name in _SHARED},
    "encoder_layer": (c_int32, POINTER(Stack), c_int32, c_void_p, c_int64, c_void_p, c_int64, c_void_p),
    "skim_scores": (c_int32, POINTER(Predictor), c_void_p, c_int64, c_void_p),
}


@functools.cache
def library() -> ctypes.CDLL:
    """Return the library, built where it is not there, and checked by a product.

    Raises:
        native.Unavailable: where it cannot be built, or computes something else
    """
    built = native.build(SOURCE, Path(steps.__file__).parent)
    for name, (result, *arguments) in SIGNATURES.items():
        function = getattr(built, name)
        function.restype, function.argtypes = result, arguments
    check(built)
    return built


def obstacle() -> Optional[str]:
    """Why the library is not there, in words, or None."""
    return native.obstacle(library)


def small_obstacle(*sizes: int) -> Optional[str]:
    """Why there are no maps of int8 for these sizes, of heads and states, in words, or None."""
    return Packing(library()).small_obstacle(*sizes)


@functools.cache
def speeds(width: int, hidden: int, rows: int, threads: int, small: bool) -> Tuple[float, float]:
    """GFLOP/s of a product of this library, on one thread, and of torch's faster one, the best of three."""
    x, weight, bias = torch.ones(rows, width), torch.ones(hidden, width), torch.ones(hidden)
    packing, y = Packing(library()), x.new_empty(rows, round_up(hidden, library().lanes()))
    packed = packing.small_map(weight, bias) if small else packing.map(weight, bias)
    clock = time.thread_time if threads == 1 else time.perf_counter

    def speed(product):
        product()
        times = []
        for _ in range(3):
            start = clock()
            product()
            times.append(clock() - start)
        return 2e-9 * rows * width * hidden / max(min(times), 1e-9)

    own = speed(lambda: packing.library.linear(byref(packed), x.data_ptr(), rows, y.data_ptr()))
    return own, max(speed(lambda each=each: each(x)) for each in torch_products(weight, bias, small))


@functools.lru_cache(maxsize=4096)
def slower(width: int, hidden: int, rows: int, threads: int, small: bool = False) -> bool:
    """Whether so many rows are better left to torch; what matters is measured once a process.

    A call here has one thread, whatever torch has. Small products are faster here by far, because calls cost nothing.
    """
    if width * hidden * rows < _LARGE:
        return False
    own, others = speeds(width, hidden, min(1 << rows.bit_length() - 1, _MOST_ROWS), threads, small)
    return own * _GAIN < others


def done(status: int):
    """Raise what a call says."""
    if status == _WRONG:
        raise ValueError("sentences of other lengths than there are rows")
    if status:
        raise MemoryError("there is no memory for a layer")


class PackedLayer:
    """A layer laid out; weights are copied.

    Args:
        stack: a :class:`~fairseq_adaptive.ops.decoder_step.naive.Stack` of it, for the depths that it serves; all is float32
            on the CPU, and of whole vectors where maps are of int8
    """

    def __init__(self, stack: steps.Stack):
        self._library = library()
        self._packing = Packing(self._library)
        self._structure = self._packing.stack(stack)
        self._real, self._more = self._structure.real, self._structure.width - self._structure.real
        self._call = functools.partial(self._library.encoder_layer, byref(self._structure))

    def __call__(self, x: Tensor, lengths: Sequence[int], depth: int = 0) -> Tensor:
        """As :func:`naive.encoder_layer`.

        Args:
            lengths: of each sentence, which may be 0; a list, or a tensor of int64

        Raises:
            ValueError: where these are not as many rows as there are
        """
        x = padded(x, 0, self._more).contiguous()
        out = torch.empty_like(x)
        if not isinstance(lengths, Tensor):
            lengths = torch.tensor(lengths, dtype=torch.long)
        done(self._call(depth, x.data_ptr(), len(x), lengths.data_ptr(), len(lengths), out.data_ptr()))
        return out[:, : self._real] if self._more else out


class PackedPredictor:
    """A :class:`~fairseq_adaptive.ops.encoder_layer.naive.Predictor` laid out; weights are copied."""

    def __init__(self, predictor: naive.Predictor):
        self._library = library()
        self._packing = packing = Packing(self._library)
        real = predictor.score.weight.size(1)
        width = round_up(real, packing.lanes)
        bias = [0.0, 0.0] if predictor.score.bias is None else predictor.score.bias.tolist()
        self._more = width - real
        self._structure = Predictor(
            first=packing.norm(predictor.first),
            second=packing.norm(predictor.second),
            map=packing.plain(predictor.map),
            score=packing.keep(predictor.score.weight, 2, width).data_ptr(),
            bias=(c_float * 2)(*bias),
            real=real,
            width=width,
        )

    def __call__(self, x: Tensor) -> Tensor:
        """R x C -> R x 2"""
        x = padded(x, 0, self._more).contiguous()
        scores = x.new_empty(len(x), 2)
        done(self._library.skim_scores(byref(self._structure), x.data_ptr(), len(x), scores.data_ptr()))
        return scores

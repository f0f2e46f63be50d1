"""What kernels in Triton share that work on tiles of matrices."""

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")  # the interpreter would multiply bits of bfloat16


@triton.jit
def dot(a, b):
    """Matrix product in the precision of ``a``, summed in float32."""
    b = b.to(a.dtype)
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def load_rows(base, rows, inside, columns, width, stride):
    """``[n, C]``, numbers ``rows`` of a matrix whose rows are ``stride`` apart; zeros where ``inside`` ``[n]`` is false and
    beyond ``width``."""
    at = base + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    return tl.load(at, mask=inside[:, None] & (columns < width)[None, :], other=0.0)


@triton.jit
def store_rows(base, values, rows, inside, columns, width, stride):
    """Write what :func:`load_rows` reads."""
    at = base + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    tl.store(at, values.to(base.dtype.element_ty), mask=inside[:, None] & (columns < width)[None, :])

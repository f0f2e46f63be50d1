"""Dropout, sum and layer norm in one kernel for each direction; the backward pass draws the mask again."""

import torch
import triton
import triton.language as tl

from fairseq_adaptive.ops.launch import block, programs


@triton.jit
def _kept(seed, row, column, dropout):
    """Block of booleans. The counter of the generator is (column, row), so that the mask depends on no launch."""
    column = column[None, :] + row[:, None] * 0
    row = row[:, None] + column * 0
    bits, _, _, _ = tl.philox(seed, column, row, column * 0, column * 0)
    return tl.uint_to_uniform_float(bits) >= dropout


@triton.jit(do_not_specialize=["seed"])
def _forward_kernel(
    x, branch, weight, bias, total, normalized, means, scales, seed, dropout, enlarged, eps,
    rows, width, drops: tl.constexpr, block_rows: tl.constexpr, block_width: tl.constexpr,
):  # fmt: skip
    """One program a block of rows."""
    row = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    column = tl.arange(0, block_width)
    place = row[:, None].to(tl.int64) * width + column[None, :]
    there = (row < rows)[:, None] & (column < width)[None, :]
    branched = tl.load(branch + place, mask=there, other=0.0).to(tl.float32)
    if drops:
        branched = tl.where(_kept(seed, row, column, dropout), branched * enlarged, 0.0)
    s = tl.load(x + place, mask=there, other=0.0).to(tl.float32) + branched
    s = s.to(total.dtype.element_ty)
    tl.store(total + place, s, mask=there)

    s = s.to(tl.float32)  # as it was rounded, which is what the backward pass reads
    mean = tl.sum(s, 1) / width
    centred = tl.where(there, s - mean[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / width + eps)
    w = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    b = tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)
    y = centred * scale[:, None] * w[None, :] + b[None, :]
    tl.store(normalized + place, y.to(normalized.dtype.element_ty), mask=there)
    tl.store(means + row, mean, mask=row < rows)
    tl.store(scales + row, scale, mask=row < rows)


@triton.jit(do_not_specialize=["seed"])
def _backward_kernel(
    total, weight, means, scales, d_total, d_normalized, d_x, d_branch, d_weight, d_bias, seed, dropout, enlarged,
    rows, width, drops: tl.constexpr, block_rows: tl.constexpr, block_width: tl.constexpr,
):  # fmt: skip
    """Each program takes every so many blocks of rows, and keeps its own sums of the gradients of weight and bias.

    With z the normalized sum and g the gradient of weight * z + bias, that of the sum is
    (g w - mean(g w) - z mean(g w z)) / deviation. ``d_total`` and ``d_branch`` may be None.
    """
    column = tl.arange(0, block_width)
    w = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    weight_sum, bias_sum = tl.zeros((block_width,), tl.float32), tl.zeros((block_width,), tl.float32)
    for start in range(tl.program_id(0) * block_rows, rows, tl.num_programs(0) * block_rows):
        row = start + tl.arange(0, block_rows)
        here = row < rows
        place = row[:, None].to(tl.int64) * width + column[None, :]
        there = here[:, None] & (column < width)[None, :]
        mean, scale = tl.load(means + row, mask=here, other=0.0), tl.load(scales + row, mask=here, other=0.0)
        z = (tl.load(total + place, mask=there, other=0.0).to(tl.float32) - mean[:, None]) * scale[:, None]
        g = tl.load(d_normalized + place, mask=there, other=0.0).to(tl.float32)  # 0 beyond the edges: z is not
        weight_sum += tl.sum(g * z, 0)
        bias_sum += tl.sum(g, 0)
        g = g * w[None, :]
        common, along = tl.sum(g, 1) / width, tl.sum(g * z, 1) / width
        g = (g - common[:, None] - z * along[:, None]) * scale[:, None]
        if d_total is not None:
            g += tl.load(d_total + place, mask=there, other=0.0).to(tl.float32)
        tl.store(d_x + place, g.to(d_x.dtype.element_ty), mask=there)
        if d_branch is not None:
            if drops:
                g = tl.where(_kept(seed, row, column, dropout), g * enlarged, 0.0)
            tl.store(d_branch + place, g.to(d_branch.dtype.element_ty), mask=there)
    tl.store(d_weight + tl.program_id(0) * width + column, weight_sum, mask=column < width)
    tl.store(d_bias + tl.program_id(0) * width + column, bias_sum, mask=column < width)


def _enlarged(dropout):
    """By how much elements grow that dropout keeps."""
    return 1 / (1 - dropout) if dropout < 1 else 0.0


class ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, branch, weight, bias, eps, dropout, seed):
        ctx.set_materialize_grads(False)  # a post-LN sublayer has no gradient of the sum
        x, branch, weight, bias = (each.contiguous() for each in (x, branch, weight, bias))
        width = x.size(-1)
        rows = x.numel() // width
        total = torch.empty_like(x, dtype=torch.promote_types(x.dtype, branch.dtype))
        # torch's layer norm is float32 under autocast on a GPU
        precise = x.is_cuda and torch.is_autocast_enabled("cuda")
        normalized = torch.empty_like(total, dtype=torch.float32 if precise else total.dtype)
        means, scales = (torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(2))
        if rows:
            blocks = block(width)
            _forward_kernel[(triton.cdiv(rows, blocks["block_rows"]),)](
                x, branch, weight, bias, total, normalized, means, scales, seed, dropout, _enlarged(dropout), eps,
                rows, width, drops=dropout > 0, **blocks,
            )  # fmt: skip
        ctx.save_for_backward(total, weight, means, scales)
        ctx.settings = x.dtype, branch.dtype, dropout, seed
        return total, normalized

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_total, d_normalized):
        total, weight, means, scales = ctx.saved_tensors
        x_dtype, branch_dtype, dropout, seed = ctx.settings
        rows, width = means.numel(), total.size(-1)
        d_total = None if d_total is None else d_total.contiguous()
        d_normalized = torch.zeros_like(total) if d_normalized is None else d_normalized.contiguous()
        d_x = torch.empty_like(total, dtype=x_dtype)
        same = dropout == 0 and x_dtype == branch_dtype
        d_branch = None if same else torch.empty_like(total, dtype=branch_dtype)
        blocks = block(width)
        count = programs(total, triton.cdiv(rows, blocks["block_rows"]))
        d_weight, d_bias = (means.new_empty(count, width) for _ in range(2))
        if rows:
            _backward_kernel[(count,)](
                total, weight, means, scales, d_total, d_normalized, d_x, d_branch, d_weight, d_bias, seed, dropout,
                _enlarged(dropout), rows, width, drops=dropout > 0, **blocks,
            )  # fmt: skip
        return d_x, d_x if same else d_branch, d_weight.sum(0), d_bias.sum(0), None, None, None


def residual_norm(x, branch, weight, bias, eps=1e-5, dropout=0.0):
    """As :func:`fairseq_adaptive.ops.residual_norm.naive.residual_norm`, for elements of at most 32 bits."""
    # drawn on the CPU: nothing waits, and checkpointed layers that run again restore the state of its generator
    seed = int(torch.randint(2**31, (), device="cpu")) if dropout else 0
    return ResidualNorm.apply(x, branch, weight, bias, eps, dropout, seed)

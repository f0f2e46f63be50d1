"""The update and its gradient in one kernel each: a state is read once and written once."""

import torch
import triton
import triton.language as tl

from fairseq_adaptive.ops.launch import block, programs


@triton.jit
def _forward_kernel(
    before, after, output, weight, bias, halting, remainders, running, threshold,
    state_out, output_out, halting_out, remainders_out, going_on_out, p_out, share_out,
    rows, width, universal: tl.constexpr, block_rows: tl.constexpr, block_width: tl.constexpr,
):  # fmt: skip
    """One program a block of rows."""
    row = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    column = tl.arange(0, block_width)
    runs = tl.load(running + row, mask=row < rows, other=0) != 0
    place = row[:, None].to(tl.int64) * width + column[None, :]
    there = (row < rows)[:, None] & (column < width)[None, :]
    w = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    x = tl.load(before + place, mask=there, other=0.0).to(tl.float32)
    y = tl.load(after + place, mask=there & runs[:, None], other=0.0).to(tl.float32)  # of others it may be NaN

    logit = tl.sum((x if universal else y) * w[None, :], 1) + tl.load(bias).to(tl.float32)
    p = tl.where(runs, tl.sigmoid(logit), 0.0)
    h = tl.load(halting + row, mask=row < rows, other=0.0)
    stops = runs & (h + p > threshold)
    rest = tl.where(stops, 1.0 - h, tl.load(remainders + row, mask=row < rows, other=0.0))
    share = tl.where(stops, rest, p)

    old = x
    if universal:
        old = tl.load(output + place, mask=there, other=0.0)
    blended = y * share[:, None] + old * (1.0 - share[:, None])
    if universal:
        tl.store(output_out + place, blended, mask=there)
        tl.store(state_out + place, tl.where(runs[:, None], y, x).to(state_out.dtype.element_ty), mask=there)
    else:
        tl.store(state_out + place, blended.to(state_out.dtype.element_ty), mask=there)
    tl.store(halting_out + row, h + share, mask=row < rows)
    tl.store(remainders_out + row, rest, mask=row < rows)
    tl.store(going_on_out + row, (runs & (stops == 0)).to(tl.uint8), mask=row < rows)
    tl.store(p_out + row, p, mask=row < rows)
    tl.store(share_out + row, share, mask=row < rows)


@triton.jit
def _backward_kernel(
    before, after, output, weight, running, going_on, p, share,
    d_state, d_output, d_halting, d_rest, d_p,
    d_before, d_after, d_old_output, d_weight, d_bias, d_old_halting, d_old_rest,
    rows, width, universal: tl.constexpr, block_rows: tl.constexpr, block_width: tl.constexpr,
):  # fmt: skip
    """Each program takes every so many blocks of rows, and keeps its own sums of the halting unit's gradients."""
    column = tl.arange(0, block_width)
    w = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    weight_sum = tl.zeros((block_width,), tl.float32)
    bias_sum = tl.zeros((block_rows,), tl.float32)
    for start in range(tl.program_id(0) * block_rows, rows, tl.num_programs(0) * block_rows):
        row = start + tl.arange(0, block_rows)
        here = row < rows
        place = row[:, None].to(tl.int64) * width + column[None, :]
        there = here[:, None] & (column < width)[None, :]
        runs = tl.load(running + row, mask=here, other=0) != 0
        goes_on = tl.load(going_on + row, mask=here, other=0) != 0
        x = tl.load(before + place, mask=there, other=0.0).to(tl.float32)
        y = tl.load(after + place, mask=there & runs[:, None], other=0.0).to(tl.float32)
        g = tl.load(d_state + place, mask=there, other=0.0).to(tl.float32)
        old, g_blended, seen = x, g, y
        if universal:
            old = tl.load(output + place, mask=there, other=0.0)
            g_blended = tl.load(d_output + place, mask=there, other=0.0)
            seen = x

        q = tl.load(p + row, mask=here, other=0.0)
        u = tl.load(share + row, mask=here, other=0.0)
        g_share = tl.where(runs, tl.sum(g_blended * (y - old), 1), 0.0)
        g_sum = tl.load(d_halting + row, mask=here, other=0.0)
        g_rest = tl.load(d_rest + row, mask=here, other=0.0)
        g_p = tl.load(d_p + row, mask=here, other=0.0) + tl.where(goes_on, g_sum + g_share, 0.0)
        g_logit = g_p * q * (1.0 - q)  # 0 where nothing ran
        weight_sum += tl.sum(g_logit[:, None] * seen, 0)
        bias_sum += g_logit

        g_after, g_old = g_blended * u[:, None], g_blended * (1.0 - u[:, None])
        g_seen = g_logit[:, None] * w[None, :]
        if universal:
            tl.store(d_old_output + place, g_old, mask=there)
            g_after += tl.where(runs[:, None], g, 0.0)
            g_old = tl.where(runs[:, None], 0.0, g) + g_seen
        else:
            g_after += g_seen
        tl.store(d_before + place, g_old.to(d_before.dtype.element_ty), mask=there)
        tl.store(d_after + place, g_after.to(d_after.dtype.element_ty), mask=there)
        stops = runs & (goes_on == 0)
        tl.store(d_old_halting + row, tl.where(stops, -g_rest - g_share, g_sum), mask=here)
        tl.store(d_old_rest + row, tl.where(stops, 0.0, g_rest), mask=here)
    tl.store(d_weight + tl.program_id(0) * width + column, weight_sum, mask=column < width)
    tl.store(d_bias + tl.program_id(0), tl.sum(bias_sum, 0))


def forward(before, after, output, weight, bias, halting, remainders, running, threshold):
    """As :func:`fairseq_adaptive.ops.halting_update.eager.forward`, for states of at most 32 bits."""
    before, after, halting, remainders, running = (
        each.contiguous() for each in (before, after, halting, remainders, running)
    )
    state, new_output = torch.empty_like(before), None
    if output is not None:
        output = output.contiguous()
        new_output = torch.empty_like(output)
    new_halting, rest, p, share = (torch.empty_like(halting) for _ in range(4))
    going_on = torch.empty_like(running)
    rows, width = running.numel(), before.size(-1)
    if rows:
        blocks = block(width)
        _forward_kernel[(triton.cdiv(rows, blocks["block_rows"]),)](
            before, after, output, weight.contiguous(), bias, halting, remainders, running.view(torch.uint8), threshold,
            state, new_output, new_halting, rest, going_on.view(torch.uint8), p, share,
            rows, width, universal=output is not None, **blocks,
        )  # fmt: skip
    return state, new_output, new_halting, rest, going_on, p, share


def backward(before, after, output, weight, running, going_on, p, share, *grads):
    """As :func:`fairseq_adaptive.ops.halting_update.eager.backward`."""
    before, after, running = (each.contiguous() for each in (before, after, running))
    grads = [None if grad is None else grad.contiguous() for grad in grads]
    d_before, d_after = torch.empty_like(before), torch.empty_like(after)
    d_output = None
    if output is not None:
        output = output.contiguous()
        d_output = torch.empty_like(output)
    d_halting, d_rest = torch.empty_like(p), torch.empty_like(p)
    rows, width = running.numel(), before.size(-1)
    blocks = block(width)
    count = programs(before, triton.cdiv(rows, blocks["block_rows"]))
    d_weight, d_bias = p.new_empty(count, width), p.new_empty(count, 1)
    if rows:
        _backward_kernel[(count,)](
            before, after, output, weight.contiguous(), running.view(torch.uint8), going_on.view(torch.uint8), p, share,
            *grads, d_before, d_after, d_output, d_weight, d_bias, d_halting, d_rest,
            rows, width, universal=output is not None, **blocks,
        )  # fmt: skip
    return d_before, d_after, d_output, d_weight.sum(0), d_bias.sum(0), d_halting, d_rest

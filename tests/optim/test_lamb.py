"""LAMB against the formula, step by step; scale, zeros, resume, half precision, flags."""

import argparse

import numpy as np
import pytest
import torch

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.optim.lamb import FairseqLamb, Lamb, LambConfig


def gradients(count, shape, seed=2):
    return [
        torch.randn(shape, generator=torch.Generator().manual_seed(seed + i), dtype=torch.float64) for i in range(count)
    ]


def take(optimizer, parameter, grads):
    for grad in grads:
        parameter.grad = grad.to(parameter.dtype)
        optimizer.step()
    return parameter.detach()


@pytest.mark.parametrize("shape", ((3, 4), (5,)))
def test_formula(shape):
    lr, (beta1, beta2), eps, decay = 0.02, (0.9, 0.95), 1e-6, 0.1
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    parameter = torch.nn.Parameter(x.clone())
    grads = gradients(7, shape)
    found = take(Lamb([parameter], lr, (beta1, beta2), eps, decay), parameter, grads)
    x, m, v = x.numpy(), 0.0, 0.0
    for t, g in enumerate((grad.numpy() for grad in grads), 1):
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        r = (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps)
        if x.ndim == 2:
            r = r + decay * x
            r = r * np.linalg.norm(x) / np.linalg.norm(r)
        x = x - lr * r
    torch.testing.assert_close(found, torch.from_numpy(x), rtol=1e-12, atol=1e-12)


def test_step_of_a_matrix_has_the_length_lr_times_its_norm():
    parameter = torch.nn.Parameter(torch.full((4, 4), 3.0, dtype=torch.float64))
    before = parameter.detach().clone()
    for scale in (1.0, 1000.0):
        parameter.data.copy_(before)
        moved = take(Lamb([parameter], lr=0.1, eps=0.0), parameter, [scale * gradients(1, (4, 4))[0]]) - before
        assert float(moved.norm()) == pytest.approx(0.1 * float(before.norm()))


def test_zeros_get_out_of_zero_and_no_gradient_moves_nothing():
    parameter = torch.nn.Parameter(torch.zeros(2, 2))
    other = torch.nn.Parameter(torch.ones(2, 2))
    moved = take(Lamb([parameter, other], lr=0.1), parameter, [torch.ones(2, 2)])
    torch.testing.assert_close(moved, torch.full((2, 2), -0.1))
    assert torch.equal(other, torch.ones(2, 2))
    assert torch.equal(take(Lamb([other], lr=0.1), other, [torch.zeros(2, 2)]), torch.ones(2, 2))


def test_state_goes_on_where_it_was():
    grads = gradients(6, (3, 3))
    whole, half = (torch.nn.Parameter(torch.eye(3, dtype=torch.float64)) for _ in range(2))
    take(Lamb([whole], 0.1), whole, grads)
    first = Lamb([half], 0.1)
    take(first, half, grads[:3])
    second = Lamb([half], 0.1)
    second.load_state_dict(first.state_dict())
    assert torch.equal(take(second, half, grads[3:]), whole)


def test_half_precision_is_computed_in_single():
    grads = [grad / 3000 for grad in gradients(3, (4, 4))]
    half, single = torch.nn.Parameter(torch.eye(4).half()), torch.nn.Parameter(torch.eye(4))
    optimizer = Lamb([half], 0.01)
    found = take(optimizer, half, grads)
    assert optimizer.state[half]["exp_avg_sq"].dtype == torch.float32
    torch.testing.assert_close(found.float(), take(Lamb([single], 0.01), single, grads), rtol=0, atol=2e-3)


def build(**flags):
    cfg = argparse.Namespace(**{**vars(LambConfig(lr=[0.5])), **flags})
    return FairseqLamb(cfg, [torch.nn.Parameter(torch.ones(2, 2))])


def test_flags():
    optimizer = build(lamb_betas="(0.8, 0.9)", weight_decay=0.3)
    group = optimizer.optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.5, (0.8, 0.9), 1e-6, 0.3)
    optimizer.set_lr(0.25)
    assert optimizer.get_lr() == 0.25
    assert optimizer.supports_memory_efficient_fp16 and not optimizer.supports_flat_params
    for betas in "0.9", "(0.9,)", "(0.9, 1.0)", "many":
        with pytest.raises(UsageError, match="give two numbers"):
            build(lamb_betas=betas)

import argparse

import pytest
import torch

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.optim.architecture_adam import ArchitectureAdam, ArchitectureAdamConfig


def optimizer(parameters, **values):
    cfg = ArchitectureAdamConfig(lr=[0.1], tpu=False, adam_betas="(0.9, 0.98)", **values)
    return ArchitectureAdam(argparse.Namespace(**vars(cfg)), parameters)


@pytest.fixture
def parameters():
    weight, architecture = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))
    architecture.param_group = "architecture"
    return [weight, architecture]


def steps(optimizer, parameters, count):
    """Which of ``count`` updates moved the architecture."""
    moved = []
    for _ in range(count):
        before = parameters[1].detach().clone()
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        weight = parameters[0].detach().clone()
        optimizer.step()
        assert not torch.equal(parameters[0], weight)
        moved.append(not torch.equal(parameters[1], before))
    return moved


def test_warmup_freezes_and_share_is_spread(parameters):
    adam = optimizer(parameters, architecture_warmup_updates=3, architecture_update_share=0.4)
    assert steps(adam, parameters, 13) == [False] * 3 + [False, False, True, False, True] * 2


def test_state_goes_on_where_it_was(parameters):
    options = {"architecture_warmup_updates": 3, "architecture_update_share": 0.4}
    whole = steps(optimizer([*parameters], **options), parameters, 13)
    first = optimizer(parameters, **options)
    begun = steps(first, parameters, 5)
    second = optimizer(parameters, **options)
    second.load_state_dict(first.state_dict())
    assert begun + steps(second, parameters, 8) == whole


def test_learning_rate_and_decay_are_its_own(parameters):
    adam = optimizer(parameters, architecture_lr=0.5, architecture_weight_decay=0.1, weight_decay=0.0)
    adam.set_lr(0.25)
    assert adam.get_lr() == 0.25
    before = [parameter.detach().clone() for parameter in parameters]
    steps(adam, parameters, 1)
    torch.testing.assert_close(before[0] - parameters[0], torch.full((2,), 0.25))
    torch.testing.assert_close(before[1] - parameters[1], torch.full((3,), 0.5 + 0.5 * 0.1))


def test_model_without_architecture_is_refused(parameters):
    with pytest.raises(UsageError, match="finds no architecture parameters"):
        optimizer(parameters[:1])


def test_share_of_nothing_is_refused(parameters):
    with pytest.raises(UsageError, match="--architecture-update-share is 0.0"):
        optimizer(parameters, architecture_update_share=0.0)

import pytest
import torch
from torch import nn

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules import LayerStack


class Append(nn.Module):
    """Writes its number into a list, to see who ran."""

    def __init__(self, number):
        super().__init__()
        self.number = number
        self.weight = nn.Parameter(torch.tensor(float(number)))

    def forward(self, x):
        return x + [self.number]


def test_is_a_sequence_of_depths_with_the_parameters_of_the_layers():
    stack = LayerStack([Append(0), Append(1)], (0, 1, 1, 0, 1))
    ran = []
    for layer in stack:
        ran = layer(ran)
    assert ran == [0, 1, 1, 0, 1]
    assert len(stack) == 5 and stack[3].number == 0 and stack[-1].number == 1
    assert list(stack.state_dict()) == ["0.weight", "1.weight"]
    assert [name for name, _ in stack.named_parameters()] == ["0.weight", "1.weight"]


@pytest.mark.parametrize(
    "schedule, message",
    [((0, 0), "never runs layer 1 of 2: use 1 unique layers"), ((0, 1, 2), "runs layer 2, but there are only 2")],
)
def test_refuses_schedules_that_do_not_fit(schedule, message):
    with pytest.raises(UsageError, match=message):
        LayerStack([Append(0), Append(1)], schedule)


def test_folding_takes_n_equal_layers_and_leaves_the_rest_alone():
    stack = LayerStack([Append(0), Append(1)], (0, 1, 1, 0))
    weights = {f"layers.{depth}.weight": torch.tensor(float(index)) for depth, index in enumerate((7, 8, 8, 7))}
    state = {"embed": torch.zeros(1), **weights}
    stack.fold_state_dict(state, "layers.")
    assert sorted(state) == ["embed", "layers.0.weight", "layers.1.weight"]
    assert (state["layers.0.weight"], state["layers.1.weight"]) == (7, 8)
    folded = dict(state)
    stack.fold_state_dict(state, "layers.")
    assert state == folded

    different = {**weights, "layers.3.weight": torch.tensor(9.0)}
    with pytest.raises(UsageError, match="layers 0 and 3, which it shares, differ: use 4 unique layers"):
        stack.fold_state_dict(different, "layers.")
    assert len(different) == 4

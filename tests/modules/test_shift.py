"""Capacities that a target moves: what a trace says of another one is what a run with it does, and it is saved."""

import pytest
import torch

from fairseq_adaptive.modules.policies import Place, build_policy
from modules.test_mixture_loops import batch, make, run


@pytest.mark.parametrize("name", ("mixture_of_depths", "mixture_of_recursions"))
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("by", (-0.6, 0.3, 5.0, -30.0))
def test_a_moved_capacity_computes_what_the_trace_said(name, causal, by):
    stack, (x, mask) = make(name, causal=causal), batch()
    run(stack, x, mask)
    said = [each.sum(1) for each in stack.router.decided(stack.traces[-1], by)]
    stack.router.move(by)
    run(stack, x, mask)
    found = [step.alive.sum(1) for step in stack.traces[-1].steps]
    assert len(said) == len(found) == 8
    for one, other in zip(said, found):
        assert torch.equal(one, other)
    again = make(name, causal=causal)
    assert not any("shift" in key for key in again.state_dict())  # as in checkpoints without a target
    again.load_state_dict(stack.state_dict(), strict=True)
    assert torch.equal(run(again, x, mask), run(stack, x, mask))


def test_token_choice_leans_to_fewer_recursions_or_more():
    stack, (x, mask) = make("token_choice", causal=False), batch()
    stack.eval()
    tokens = int((~mask).sum())
    for position, most in ((0.0, 1), (1.0, stack.router.count)):
        assert stack.router.turn(position) == {}
        run(stack, x, mask)
        shared = [step.alive.sum() for step in stack.router.begun(stack.traces[-1])]
        assert [int(each) for each in shared] == [tokens] * most + [0] * (stack.router.count - most)


def test_a_tape_is_turned_from_its_first_token_to_a_full_one():
    torch.manual_seed(2)
    tape = build_policy("reader", "tape", Place(8, 2), tokens=6, threshold=2.0, bank_size=40).eval()
    x, lengths = torch.randn(5, 3, 8), []
    for position in (0.0, 0.5, 1.0):
        tape.turn(position)
        lengths.append(tape.read(x, torch.zeros(3, 5).bool()).live.sum(1))
    assert lengths[0].tolist() == [1] * 3 and lengths[2].tolist() == [6] * 3
    assert (lengths[0] <= lengths[1]).all() and (lengths[1] <= lengths[2]).all()
    again = build_policy("reader", "tape", Place(8, 2), tokens=6, threshold=2.0, bank_size=40).eval()
    again.load_state_dict(tape.state_dict(), strict=True)
    assert again.reader.entries_per_token == 3
    assert torch.equal(again.read(x, torch.zeros(3, 5).bool()).live, tape.read(x, torch.zeros(3, 5).bool()).live)

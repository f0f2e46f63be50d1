import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fairseq_adaptive.modules import LayerStack, Step, Trace, recording


def trace_of(*alive, limit=4):
    """Alive masks of a batch of 1 x 3 tokens, the last of which is padding."""
    steps = []
    for depth, row in enumerate(alive):
        after = alive[depth + 1] if depth + 1 < len(alive) else (False,) * 3
        now, later = torch.tensor([row]), torch.tensor([after])
        steps.append(Step(0, now, halted=now & ~later, probability=torch.full((1, 3), 0.5)))
    return Trace(torch.tensor([[True, True, False]]), limit, steps, remainders=torch.tensor([[0.3, 0.0, 0.9]]))


def test_counts_updates_and_price_without_padding():
    trace = trace_of((True, True, False), (True, False, False), (True, False, False))
    assert trace.updates.tolist() == [[3, 1, 0]]
    assert trace.histogram().tolist() == [1, 0, 1, 0] and trace.at_limit() == 0
    assert torch.isclose(trace.ponder_cost(), torch.tensor(4.3))


def test_at_limit_are_those_that_never_halted():
    trace = trace_of((True, True, False), (True, True, False), limit=2)
    assert trace.at_limit() == 0
    trace.steps[-1].halted = torch.tensor([[False, True, False]])
    assert trace.at_limit() == 1


def test_a_distribution_counts_as_expected():
    trace = trace_of(*[(True, True, False)] * 2, limit=2)
    trace.distribution = torch.tensor([[[0.25, 1.0, 0.5]], [[0.75, 0.0, 0.5]]])
    assert trace.updates.tolist() == [[1.75, 1.0, 0.0]]
    assert trace.histogram().tolist() == [1.25, 0.75]


def test_recording_is_on_within_the_block_only_and_nests():
    model = torch.nn.ModuleDict({"encoder": LayerStack([torch.nn.Identity()], (0,))})
    trace = trace_of((True, True, False))
    with recording(model) as outer:
        model["encoder"].record(trace)
        with recording(model) as inner:
            model["encoder"].record(trace)
        model["encoder"].record(trace)
    model["encoder"].record(trace)
    assert outer == {"encoder": [trace] * 3} and inner == {"encoder": [trace]}


def test_a_trace_belongs_to_a_call():
    """Several threads record one stack at a time; a thread without a block is not recorded, and the stack keeps nothing."""

    def kept():
        gc.collect()
        return sum(isinstance(each, Trace) for each in gc.get_objects())

    stack, before = LayerStack([torch.nn.Identity()], (0, 0)), kept()
    with pytest.raises(AttributeError):
        stack.recorder = []

    def updates(length):
        with recording(stack) as traces:
            for part in range(1, length + 1):
                stack.record(Trace(torch.ones(1, part), 2))
        return [trace.tokens.size(1) for trace in traces[""]]

    with recording(stack) as outer, ThreadPoolExecutor(8) as pool:
        assert list(pool.map(updates, [50] * 200)) == [list(range(1, 51))] * 200
    assert outer == {"": []} and stack.recorder is None
    assert kept() == before

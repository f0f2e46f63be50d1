"""Every stack of every family leaves one trace of a call where someone records, and none where no one does."""

import pytest
import torch
from families import FAMILIES, build_trainer, write_data

from fairseq_adaptive.modules import LayerStack, recording

KINDS = {"par_transformer_xl": ["attention", "feed-forward", "feed-forward"] * 2, "par_supernet": ["mixture"] * 3}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("families"))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_stack_leaves_a_trace(name, data):
    trainer, batches = build_trainer(name, data, "--max-update", "10")
    model, sample = trainer.model, next(iter(batches))
    stacks = {name: module for name, module in model.named_modules() if isinstance(module, LayerStack)}
    inputs, criterion, padding = sample["net_input"], trainer.criterion, 0
    for training in (True, False):
        model.train(training), criterion.train(training)
        with torch.set_grad_enabled(training), recording(model) as traces:
            criterion(model, sample)
        assert traces.keys() == stacks.keys() and all(len(each) == 1 for each in traces.values())
        for where, (trace,) in traces.items():
            stack = stacks[where]
            assert trace.limit == len(stack) and len(trace.steps) <= len(stack)
            if not stack.adaptive:
                assert [step.layer for step in trace.steps] == list(stack.schedule)
                assert all(torch.equal(step.alive, trace.present(step)) for step in trace.steps)
                assert torch.equal(trace.updates, sum(trace.present(step).long() for step in trace.steps))
            assert [step.kind for step in trace.steps] == list(KINDS.get(name, ["layer"] * len(trace.steps)))
            assert not any((step.alive & ~trace.tokens).any() for step in trace.steps)
            words = inputs.get("prev_output_tokens" if where.startswith("decoder") else "src_tokens", None)
            words = inputs.get("src_tokens") if words is None and where.startswith("decoder") else words
            if words is not None and trace.reading is None and words.shape == trace.tokens.shape:
                pad = trainer.task.source_dictionary.pad()
                assert torch.equal(trace.tokens, words.ne(pad))
                padding += int(words.eq(pad).sum())
            if name == "par_supernet":
                torch.testing.assert_close(trace.mixture, model.decoder.probabilities())
                assert trace.mixture.requires_grad == training and trace.mixture.shape == (3, 3)
            else:
                assert trace.mixture is None
    assert not any(stack.recorder for stack in stacks.values())
    assert padding or name.startswith(("adatape", "par_")) or name == "shared_transformer_lm"  # which have none here

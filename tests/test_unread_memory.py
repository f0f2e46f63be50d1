"""Memory that must not be read holds NaN here, and nothing changes: not what is trained, evaluated or generated.

There are two kinds of it. Memory that was allocated and not yet written: caches with room for words to come, the halves of
buffers, the outputs and gradients of kernels. torch fills it with NaN when it is asked to. And what padding has: its
embedding, its position.
"""

import contextlib

import pytest
import torch
from families import FAMILIES, build_trainer, train, write_data

GENERATE = "shared_transformer", "universal_transformer", "pondernet"
# models that compute nothing of padding in evaluation
PACKED = "transkimmer", "albert_act", "adatape_parity"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@contextlib.contextmanager
def unwritten(poison):
    """Whether memory that is allocated is NaN, and the largest integer. Algorithms are the same in both cases."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = poison
    try:
        assert not poison or torch.empty(3).isnan().all()
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(False)


def all_that_is_computed(name, data):
    """Losses and weights of two updates, the loss of an evaluation, and hypotheses."""
    trainer, batches = build_trainer(name, data, "--batch-size", "12")
    found = train(trainer, batches, 2)
    rows = list(zip(range(2), batches))
    valid = [trainer.valid_step(batch) for _, batch in rows]
    hypotheses = []
    if name in GENERATE:
        model, sample = trainer.get_model().eval(), rows[0][1]
        generator = trainer.task.build_generator([model], trainer.cfg.generation)
        found_of = trainer.task.inference_step(generator, [model], sample)
        hypotheses = [(each["tokens"], each["positional_scores"]) for sentence in found_of for each in sentence]
    keys = "loss", "nll_loss", "gnorm", "ponder_cost"
    losses = [{key: log[key] for key in keys if key in log} for log in found]
    weights = {key: value.clone() for key, value in trainer.get_model().state_dict().items()}
    return losses, weights, [{key: log[key] for key in keys if key in log} for log in valid], hypotheses


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_is_read_that_was_not_written(name, data):
    with unwritten(poison=False):
        plain = all_that_is_computed(name, data)
    with unwritten(poison=True):
        poisoned = all_that_is_computed(name, data)
    assert poisoned[0] == plain[0] and poisoned[2] == plain[2] and plain[0] and plain[2]
    torch.testing.assert_close(poisoned[1], plain[1], rtol=0, atol=0)
    torch.testing.assert_close(poisoned[3], plain[3], rtol=0, atol=0)


def test_the_poison_is_seen_where_it_is_read():
    with unwritten(poison=True):
        cache = torch.ones(3).new_empty(3)
        cache[:2] = 1
        assert cache.sum().isnan() and cache[:2].sum() == 2

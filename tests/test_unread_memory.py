"""Memory that must not be read holds NaN here, and nothing changes: not what is trained, evaluated or generated.

There are two kinds of it. Memory that was allocated and not yet written: caches with room for words to come, the halves of
buffers, the outputs and gradients of kernels. torch fills it with NaN when it is asked to. And the embedding of padding,
which is far too large here and no NaN: fairseq multiplies it by 0.
"""

import contextlib
import copy

import pytest
import torch
from families import FAMILIES, build_trainer, train, write_data

GENERATE = "shared_transformer", "universal_transformer", "pondernet"
QUICK = "shared_transformer", "par_transformer_xl", "transkimmer"
PADDED = "shared_transformer", "universal_transformer", "pondernet", "transkimmer"


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
    trainer, batches = build_trainer(name, data, "--batch-size", "12", "--max-update", "100")
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
    state = trainer.get_model().state_dict()
    # fairseq's _float_tensor has a type and a device, and no value
    weights = {key: value.clone() for key, value in state.items() if "_float_tensor" not in key}
    return losses, weights, [{key: log[key] for key in keys if key in log} for log in valid], hypotheses


@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=[] if each in QUICK else pytest.mark.slow) for each in FAMILIES]
)
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


@pytest.mark.parametrize("name", PADDED)
def test_padding_is_not_read(name, data):
    trainer, _ = build_trainer(name, data)
    dataset, pad = trainer.task.dataset("train"), trainer.task.source_dictionary.pad()
    batch = dataset.collater([dataset[index] for index in range(12)])  # of all lengths
    tokens = [value for value in batch["net_input"].values() if torch.is_tensor(value) and value.dim() == 2]
    assert tokens and all(each.eq(pad).any() for each in tokens)
    model = trainer.get_model()
    plain = trainer.valid_step(batch)
    poisoned = []
    for part in list(model.modules()):
        for table, found in list(part.named_children()):
            if table.startswith("embed_") and isinstance(found, torch.nn.Embedding) and found.padding_idx is not None:
                changed = copy.deepcopy(found)  # else it would be the map to words, too
                with torch.no_grad():
                    changed.weight[found.padding_idx] = 1e4
                setattr(part, table, changed)
                poisoned.append(changed)
    assert poisoned and trainer.valid_step(batch)["loss"] == plain["loss"]
    with torch.no_grad():
        poisoned[0].weight.mul_(2)
    assert trainer.valid_step(batch)["loss"] != plain["loss"]  # it is these tables that are read

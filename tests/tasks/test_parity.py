from types import SimpleNamespace

import pytest
import torch

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.tasks.parity import ParityConfig, ParityTask


def make(split="train", **settings):
    cfg = SimpleNamespace(
        **{
            **vars(ParityConfig()),
            "seed": 1,
            "sequence_length": 9,
            "train_examples": 600,
            "eval_examples": 50,
            **settings,
        }
    )
    task = ParityTask(cfg)
    task.load_dataset(split)
    return task.dataset(split)


def batch_of(dataset, *indices):
    return dataset.collater([dataset[index] for index in indices])


def test_batch_holds_the_parity_of_the_ones():
    dataset = make()
    batch = batch_of(dataset, *range(600))
    elements = batch["net_input"]["elements"] - 1
    assert elements.shape == (600, 9) and set(elements.unique().tolist()) == {-1, 0, 1}
    assert torch.equal(batch["target"], (elements == 1).sum(1) % 2)
    assert 0.28 < (elements == 1).float().mean() < 0.39 and 0.4 < batch["target"].float().mean() < 0.6
    assert batch["nsentences"] == 600 and batch["ntokens"] == 5400


def test_epochs_differ_and_are_a_function_of_seed_and_epoch():
    dataset, again, other = make(), make(), make(seed=2)
    for each in dataset, again, other:
        each.set_epoch(3)
    third = torch.as_tensor(dataset.sequences)
    assert torch.equal(third, torch.as_tensor(again.sequences))
    assert not torch.equal(third, torch.as_tensor(other.sequences))
    dataset.set_epoch(4)
    assert not torch.equal(third, torch.as_tensor(dataset.sequences))
    dataset.set_epoch(3)
    assert torch.equal(third, torch.as_tensor(dataset.sequences))
    assert not dataset.can_reuse_epoch_itr_across_epochs


def test_evaluation_is_the_same_in_every_run_and_epoch():
    valid, other = make("valid"), make("valid", seed=2)
    other.set_epoch(7)
    assert len(valid) == 50 and (valid.sequences == other.sequences).all()
    assert (valid.sequences != make("test").sequences).any()


def test_reads_files(tmp_path):
    (tmp_path / "valid.txt").write_text("1 0 -1 1\n-1 1\n")
    dataset = make("valid", parity_data=str(tmp_path), sequence_length=5)
    batch = batch_of(dataset, 1, 0)
    assert batch["net_input"]["elements"].tolist() == [[0, 2, 3, 3, 3], [2, 1, 0, 2, 3]]
    assert batch["target"].tolist() == [1, 0] and batch["ntokens"] == 6


@pytest.mark.parametrize(
    "text, message",
    (
        ("1 0\n1 2 0\n", "valid.txt, line 2 holds '2': write elements 1, 0 and -1"),
        ("1 0\n\n", "line 2 is empty"),
        ("1 0 1 0 1 0\n", "line 1 has 6 elements: use --sequence-length 6"),
        ("", "valid.txt is empty"),
    ),
)
def test_names_what_is_wrong_in_a_file(tmp_path, text, message):
    (tmp_path / "valid.txt").write_text(text)
    with pytest.raises(UsageError, match=message):
        make("valid", parity_data=str(tmp_path), sequence_length=5)
    with pytest.raises(FileNotFoundError, match="train.txt"):
        make("train", parity_data=str(tmp_path))


def test_refuses_empty_sequences():
    with pytest.raises(UsageError, match="--sequence-length is 0: use a whole number from 1"):
        make(sequence_length=0)

from argparse import Namespace
from types import SimpleNamespace

import pytest
from fairseq import tasks
from torch import nn

from fairseq_adaptive.data.segmented_dataset import SegmentedDataset
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.tasks.segmented_language_modeling import takes_memory


def segmented_task(dictionary, folder, **flags):
    dictionary.save(str(folder / "dict.txt"))
    return tasks.setup_task(Namespace(task="segmented_language_modeling", data=str(folder), **flags))


@pytest.fixture
def task(dictionary, tmp_path):
    return segmented_task(dictionary, tmp_path)


@pytest.mark.parametrize(
    "flag, value",
    [
        ("sample_break_mode", "eos"),
        ("add_bos_token", True),
        ("past_target", True),
        ("shorten_method", "truncate"),
        ("output_dictionary_size", 10),
    ],
)
def test_flags_of_sentences_are_refused(flag, value, dictionary, tmp_path):
    with pytest.raises(UsageError, match=f"--{flag.replace('_', '-')} has no meaning"):
        segmented_task(dictionary, tmp_path, **{flag: value})


def text(dictionary, total, length):
    return SegmentedDataset(
        [dictionary.encode_line("word1 " * (total - 1), add_if_not_exist=False)], [total], dictionary, "train", length
    )


def test_batch_size_is_the_number_of_streams(task, dictionary):
    with pytest.raises(UsageError, match="needs --batch-size"):
        task.get_batch_iterator(text(dictionary, 20, 7), max_tokens=100)
    batch = next(task.get_batch_iterator(text(dictionary, 20, 7), max_sentences=5, num_shards=2).next_epoch_itr())
    assert batch["target"].shape == (5, 2) and batch["segment"]["rows"] == 10


def test_models_without_memory_read_the_same_segments(task, dictionary):
    task.takes_memory, task.longest = False, 6
    with pytest.raises(UsageError, match="segments of 7 tokens are longer than the 6 positions.*--tokens-per-sample 6"):
        task.get_batch_iterator(text(dictionary, 20, 7), max_sentences=2)
    for batch in task.eval_lm_dataloader(text(dictionary, 20, 6), batch_size=2, num_workers=0):
        assert "memory" not in batch["net_input"]


def test_models_with_memory_get_it(task, dictionary):
    memories = [
        batch["net_input"]["memory"]
        for batch in task.eval_lm_dataloader(text(dictionary, 20, 6), batch_size=2, num_workers=0)
    ]
    assert len(memories) == 2 and memories[0] is memories[1]


@pytest.mark.parametrize("holder", ["model", "decoder"])
def test_memory_is_found_in_the_signature(holder):
    class WithMemory(nn.Module):
        def forward(self, tokens, memory=None):
            pass

    class Without(nn.Module):
        def forward(self, tokens, **kwargs):
            pass

    model = WithMemory() if holder == "model" else Without()
    assert takes_memory(model) == (holder == "model")
    model.decoder = WithMemory()
    assert takes_memory(model)


def test_training_memory_survives_validation(task, dictionary):
    seen = []

    def criterion(model, sample):
        memory = sample["net_input"]["memory"]
        seen.append(memory.states)
        memory.states = [*(memory.states or []), model.name]
        return SimpleNamespace(), 1, {}

    def steps(name, batches):
        model = SimpleNamespace(name=name, train=lambda: None, eval=lambda: None, set_num_updates=lambda number: None)
        optimizer = SimpleNamespace(backward=lambda loss: None)
        for batch in batches:
            if name == "train":
                task.train_step(batch, model, criterion, optimizer, update_num=len(seen))
            else:
                task.valid_step(batch, model, criterion)

    batches = list(task.get_batch_iterator(text(dictionary, 20, 6), max_sentences=1).next_epoch_itr())
    steps("train", batches[:2])
    steps("valid", batches)  # the same split: its memory is another
    steps("train", batches[2:])
    trained = [None, ["train"], ["train"] * 2, ["train"] * 3]
    validated = [None, ["valid"], ["valid"] * 2, ["valid"] * 3]
    assert seen == trained[:2] + validated + trained[2:]
    assert task.evaluation.memory.states is None


def test_generation_from_segments_is_refused(task, dictionary):
    (batch,) = task.get_batch_iterator(text(dictionary, 5, 6), max_sentences=1).next_epoch_itr()
    with pytest.raises(UsageError, match="--task language_modeling --sample-break-mode eos"):
        task.inference_step(None, [], batch)


def test_context_window_is_refused(task, dictionary):
    with pytest.raises(UsageError, match="--context-window is for --task language_modeling"):
        task.eval_lm_dataloader(text(dictionary, 5, 6), batch_size=1, context_window=2)

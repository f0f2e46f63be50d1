import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from fairseq_adaptive.data.segment_stream import SegmentStream
from fairseq_adaptive.data.segmented_dataset import SegmentedDataset, SegmentIterator
from fairseq_adaptive.errors import UsageError


def text(total):
    """A text whose token at position p is 4 + p % 40, in lines of 0 to 3 tokens."""
    tokens, lines = 4 + torch.arange(total) % 40, []
    while tokens.numel():
        size = len(lines) % 4
        lines.append(tokens[:size])
        tokens = tokens[size:]
    return lines, np.array([len(line) for line in lines])


def dataset(dictionary, total, length, rows):
    return SegmentedDataset(*text(total), dictionary, "train", length).with_rows(rows)


def batches(data, batch_size, workers=1):
    """Batches of an epoch, those of one worker after the other."""
    return [
        list(SegmentIterator(data, batch_size, num_shards=workers, shard_id=worker).next_epoch_itr(shuffle=True))
        for worker in range(workers)
    ]


@pytest.mark.parametrize(
    "total, length, rows",
    [(1, 1, 1), (10, 3, 10), (23, 4, 3), (29, 4, 3), (25, 4, 3), (26, 9, 2), (26, 500, 5), (100, 7, 4)],
)
def test_every_token_is_predicted_once_after_the_one_before(dictionary, total, length, rows):
    read = batches(dataset(dictionary, total, length, rows), rows)[0]
    targets = torch.cat([batch["target"] for batch in read], dim=1)
    sources = torch.cat([batch["net_input"]["src_tokens"] for batch in read], dim=1)
    kept = targets.ne(dictionary.pad())
    assert targets[kept].tolist() == [4 + place % 40 for place in range(total)]
    assert sources[kept].tolist() == [dictionary.eos(), *targets[kept].tolist()[:-1]]
    assert not sources.eq(dictionary.pad()).any()
    assert sum(batch["ntokens"] for batch in read) == total
    assert {batch["target"].size(1) for batch in read[:-1]} <= {length}
    assert kept.sum(dim=1).max() - kept.sum(dim=1).min() <= 1


def test_rows_do_not_depend_on_the_number_of_workers(dictionary):
    data = dataset(dictionary, 101, 7, 4)
    (alone,), pair = batches(data, 4), batches(data, 2, workers=2)
    assert len(pair[0]) == len(pair[1]) == len(alone)
    for whole, first, second in zip(alone, *pair, strict=True):
        for name in "id", "target":
            assert torch.equal(torch.cat((first[name], second[name])), whole[name])
        assert (first["segment"]["first_row"], second["segment"]["first_row"]) == (0, 2)
    assert len({int(i) for batch in alone for i in batch["id"]}) == len(data)


def test_loading_processes_keep_the_order(dictionary):
    data = dataset(dictionary, 101, 7, 4)
    loader = DataLoader(data, batch_sampler=data.batches(4), collate_fn=data.collater, num_workers=2)
    assert [batch["target"].tolist() for batch in loader] == [batch["target"].tolist() for batch in batches(data, 4)[0]]


@pytest.mark.parametrize("rows, length, message", [(11, 3, "10 tokens, too few for 11 streams"), (1, 0, "at least 1")])
def test_impossible_cuts(dictionary, rows, length, message):
    with pytest.raises(UsageError, match=message):
        dataset(dictionary, 10, length, rows)


@pytest.mark.parametrize("rows, length, after", [(2, 5, 4), (4, 5, 2), (2, 10, 2), (20, 5, 0), (2, 1, 20)])
def test_other_cut_goes_on_at_the_same_share(dictionary, rows, length, after, caplog):
    epoch = SegmentIterator(dataset(dictionary, 100, 5, 2), 2)
    read = epoch.next_epoch_itr()
    for _ in range(4):
        next(read)
    other = SegmentIterator(dataset(dictionary, 100, length, rows), rows)
    other.load_state_dict(epoch.state_dict())
    assert next(other.next_epoch_itr())["segment"]["offset"] == after * length
    assert ("goes on after segment" in caplog.text) == ((rows, length) != (2, 5))


class Model:
    """Remembers the last inputs, as a model does in training."""

    def __call__(self, sample):
        memory = sample["net_input"]["memory"]
        seen = None if memory.states is None else memory.states[0]
        tokens = sample["net_input"]["src_tokens"]
        memory.states = [torch.cat((seen, tokens), dim=1) if seen is not None else tokens, None]
        return [] if seen is None else seen.tolist()


def read(stream, samples, update=None):
    return [Model()(stream.attach(sample, update)) for sample in samples]


@pytest.fixture
def epoch(dictionary):
    return batches(dataset(dictionary, 29, 4, 2), 2)[0]


def test_memory_is_that_of_the_text_before(epoch, caplog):
    stream = SegmentStream()
    before = [
        torch.cat([batch["net_input"]["src_tokens"] for batch in epoch[:i]], dim=1).tolist() if i else []
        for i in range(len(epoch))
    ]
    assert read(stream, epoch) == before
    assert read(stream, epoch) == before  # the next epoch starts without one
    assert read(stream, epoch[:2]) + read(stream, epoch[:2]) == before[:2] * 2
    assert not caplog.records


def test_dummy_batches_leave_it_alone(dictionary, epoch):
    iterator = SegmentIterator(dataset(dictionary, 29, 4, 2), 2)
    stream = SegmentStream()
    first = read(stream, epoch[:2])
    assert read(stream, [iterator.first_batch]) == [[]]
    assert first + read(stream, epoch[2:]) == read(SegmentStream(), epoch)


def test_a_batch_that_does_not_follow(epoch, caplog):
    stream = SegmentStream()
    read(stream, epoch[:1])
    assert read(stream, epoch[2:3]) == [[]]
    assert len(caplog.records) == 1 and "starts empty at token 8" in caplog.text


def test_an_update_computed_again_has_the_same_memory(epoch, caplog):
    stream = SegmentStream()
    read(stream, epoch[:1], update=0)
    once = read(stream, epoch[1:3], update=1)
    assert read(stream, epoch[1:3], update=1) == once
    assert read(stream, epoch[3:], update=2) == read(SegmentStream(), epoch)[3:]
    assert not caplog.records


def test_saved_memory_goes_to_the_rows_of_any_worker(dictionary, epoch):
    stream = SegmentStream()
    read(stream, epoch[:2])
    state, rest = stream.gather(), read(stream, epoch[2:])
    for worker, mine in enumerate(batches(dataset(dictionary, 29, 4, 2), 1, workers=2)):
        resumed = SegmentStream()
        resumed.load_state_dict(state)
        assert resumed.gather() == state
        assert read(resumed, mine[2:]) == [rows[worker : worker + 1] for rows in rest]
    assert stream.gather()["states"] == []  # read to the end


def test_saved_memory_of_other_rows_is_not_used(dictionary, epoch, caplog):
    stream, resumed = SegmentStream(), SegmentStream()
    read(stream, epoch[:2])
    resumed.load_state_dict(stream.gather())
    other = batches(dataset(dictionary, 29, 4, 1), 1)[0]
    assert read(resumed, other[2:4]) == [[], other[2]["net_input"]["src_tokens"].tolist()]
    assert len(caplog.records) == 1

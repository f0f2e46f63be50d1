"""What waits for a minute says for what."""

import logging
import time

import pytest
import torch
import torch.multiprocessing as multiprocessing
from fairseq.data import iterators

from fairseq_adaptive.compat import waits

COLLECTIVES = {
    "all_reduce": lambda dist: dist.all_reduce(torch.ones(1)),
    "broadcast": lambda dist: dist.broadcast(torch.ones(1), 1),
    "all_gather": lambda dist: dist.all_gather([torch.empty(1), torch.empty(1)], torch.ones(1)),
    "objects": lambda dist: dist.all_gather_object([None, None], 1),
    "barrier": lambda dist: dist.barrier(),
    "of fairseq": lambda dist: __import__("fairseq").distributed.utils.all_reduce_dict(
        {"a": 1.0}, torch.device("cpu"), dist.group.WORLD
    ),
}


def work(rank, folder):
    """The second worker comes a second late to every second call."""
    import torch.distributed as dist

    import fairseq_adaptive.plugin  # noqa: F401  applies the patches

    waits.AFTER = 0.3
    logging.basicConfig(filename=f"{folder}/{rank}", level=logging.WARNING, force=True)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for name, call in COLLECTIVES.items():
        call(dist)  # in time
        logging.warning(f"[{name}]")
        if rank:
            time.sleep(1)
        call(dist)


@pytest.mark.slow
def test_a_worker_that_waits_for_others_says_so(tmp_path):
    multiprocessing.spawn(work, args=(str(tmp_path),), nprocs=2)
    parts = (tmp_path / "0").read_text().split("WARNING:root:[")[1:]
    assert [part.partition("]")[0] for part in parts] == list(COLLECTIVES)
    for part in parts:
        assert part.count("worker 0 of 2 waits for the others: one may be stopped") == 1, part
        assert part.count("going on after 1 seconds") == 1, part


class Slow(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        if index == 2:
            time.sleep(1)
        return index


@pytest.mark.parametrize("buffer", [0, 4])
def test_who_waits_for_data_says_so(buffer, monkeypatch, caplog):
    monkeypatch.setattr(waits, "AFTER", 0.3)
    monkeypatch.setattr(waits, "_watcher", None)  # it sleeps as long as it was told
    loader = torch.utils.data.DataLoader(Slow(), batch_size=1, num_workers=1)
    batches = iterators.BufferedIterator(buffer, loader) if buffer else loader
    grouped = iterators.GroupedIterator(iterators.CountingIterator(batches), 1)
    assert [int(batch[0]) for batch in grouped] == [0, 1, 2, 3]
    notes = [record.getMessage() for record in caplog.records if record.name == waits.__name__]
    assert len(notes) == 2 and "the next batch is waited for" in notes[0] and notes[1].startswith("going on after ")
    assert not waits._waits


def test_short_waits_and_errors_leave_nothing(monkeypatch, caplog):
    grouped = iterators.CountingIterator([1], total=2)
    assert next(grouped) == 1
    with pytest.raises(IndexError, match="exhausted"):
        next(grouped)
    assert not waits._waits and not [record for record in caplog.records if record.name == waits.__name__]

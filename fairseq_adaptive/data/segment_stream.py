"""Where a reading of streams of segments stands, and what the model remembers of it."""

import logging

import torch
import torch.distributed as dist
from fairseq.distributed import utils as distributed_utils

from fairseq_adaptive.modules.transformer_xl.memory import SegmentMemory

logger = logging.getLogger(__name__)


class SegmentStream:
    """The memory of one reading, in order, of a :class:`SegmentedDataset` on one worker.

    The memory starts empty at the beginning of a split and is given to each following segment; it is also emptied, with
    a warning, before a segment that does not follow. A segment that is computed again within one update (fairseq does
    so where ``--amp`` has overflowed) gets the memory that it had at first.
    """

    def __init__(self):
        self.memory = SegmentMemory()
        self.next = None  # split, rows and offset of the segment that follows
        self.last = True  # whether the text has been read to its end
        self.update, self.start = None, (None, None)  # the first segment of an update, and the memory before it
        self.saved = None  # memory of the rows of all workers, from a checkpoint

    def attach(self, sample, update=None):
        """A copy of a batch with ``net_input.memory``.

        Args:
            sample: a batch of :meth:`SegmentedDataset.collater`; one with ``segment`` None gets a memory of its own
            update: number of the update that the batch is computed for, in training
        """
        segment = sample["segment"]
        if segment is None:
            return _with_memory(sample, SegmentMemory())
        size, width = sample["target"].shape
        place = (segment["split"], segment["rows"], segment["offset"])
        if place == self.next and self.saved:
            rows = slice(segment["first_row"], segment["first_row"] + size)
            self.memory.states = _each(lambda state: state[rows].to(sample["target"].device, copy=True), self.saved)
        elif update is not None and (update, place) == (self.update, self.start[0]):
            self.memory.states = self.start[1]
        elif segment["offset"] == 0:
            self.memory.clear()
        elif place != self.next:
            logger.warning(
                f"the memory starts empty at token {segment['offset']} of the streams of {segment['split']}: what is "
                "remembered is of another place, or of another number of streams"
            )
            self.memory.clear()
        if update is None or update != self.update:
            self.update, self.start = update, (place, self.memory.states if update is not None else None)
        self.saved = None
        self.next, self.last = (*place[:2], segment["offset"] + width), segment["last"]
        return _with_memory(sample, self.memory)

    def gather(self):
        """The state for a checkpoint; every worker must call it at the same time, and that of worker 0 counts.

        ``states`` are those of the memory, with the rows of all workers joined in their order, ``[rows, M, C]``, so
        that it does not matter how many workers resume.
        """
        if self.last:  # the next segment is the first, which has no memory
            return {"split": "", "rows": 0, "offset": 0, "states": []}
        states = self.saved or _each(_gather_rows, self.memory.states or [])
        split, rows, offset = self.next
        return {"split": split, "rows": rows, "offset": offset, "states": states}

    def load_state_dict(self, state_dict):
        self.next = (state_dict["split"], state_dict["rows"], state_dict["offset"])
        self.saved, self.last = state_dict["states"], not state_dict["rows"]


def _with_memory(sample, memory):
    return {**sample, "net_input": {**sample["net_input"], "memory": memory}}


def _each(function, states):
    return [state if state is None else function(state) for state in states]


def _gather_rows(state):
    """``[B, ...]`` of each worker -> ``[B * workers, ...]`` on the CPU of worker 0, None elsewhere."""
    group = distributed_utils.get_data_parallel_group()
    workers = distributed_utils.get_world_size(group)
    if workers == 1:
        return state.cpu()
    raw = state.contiguous().view(torch.uint8)  # gloo does not know every type
    first = distributed_utils.get_rank(group) == 0
    parts = [torch.empty_like(raw) for _ in range(workers)] if first else None
    dist.gather(raw, parts, dst=dist.get_global_rank(group, 0) if group is not None else 0, group=group)
    return torch.cat(parts).cpu().view(state.dtype) if first else None

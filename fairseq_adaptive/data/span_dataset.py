"""Windows of questions and contexts as a data set of fairseq."""

import numpy as np
import torch
from fairseq.data import FairseqDataset, data_utils


class SpanDataset(FairseqDataset):
    """Windows, in random order, those of like length together.

    Args:
        windows: of :func:`~fairseq_adaptive.data.squad.windows_of`
        padding: number of ``<pad>``
        seed: of the order; the epoch is added to it
        name: of the split
    """

    def __init__(self, windows, padding: int, seed: int, name: str):
        self.windows, self._padding, self._seed, self._epoch, self._name = windows, padding, seed, 1, name
        self.sizes = np.array([len(window.tokens) for window in windows])

    def __getitem__(self, index):
        return index

    def __len__(self):
        return len(self.windows)

    def num_tokens(self, index):
        return self.sizes[index]

    def size(self, index):
        return self.sizes[index]

    def set_epoch(self, epoch):
        self._epoch = epoch

    @property
    def can_reuse_epoch_itr_across_epochs(self):
        return False

    def ordered_indices(self):
        with data_utils.numpy_seed(self._seed, self._epoch):
            order = np.random.permutation(len(self))
        return order[np.argsort(self.sizes[order], kind="mergesort")]

    def collater(self, samples):
        """A batch: ``src_tokens`` B x T, ``target`` B x 2, the first and last place of the answer."""
        if not samples:
            return {}
        windows = [self.windows[index] for index in samples]
        tokens = data_utils.collate_tokens([torch.tensor(window.tokens) for window in windows], self._padding)
        return {
            "id": torch.tensor(samples),
            "split": self._name,
            "net_input": {"src_tokens": tokens},
            "target": torch.tensor([[window.start, window.end] for window in windows]),
            "ntokens": int(self.sizes[samples].sum()),
            "nsentences": len(windows),
        }

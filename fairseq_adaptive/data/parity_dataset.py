"""Sequences over {1, 0, -1} and the parity of their ones."""

from typing import List

import numpy as np
import torch
from fairseq.data import FairseqDataset

from fairseq_adaptive.errors import UsageError

PAD = 3  # behind the codes 0, 1, 2 of the elements -1, 0, 1


class ParityDataset(FairseqDataset):
    """Base of both: what a batch is.

    A batch has ``net_input.elements`` (B x L, elements plus one, padded with 3) and ``target`` (B).

    Args:
        length: L, to which sequences are padded
    """

    def __init__(self, length: int):
        self.length = length

    def __getitem__(self, index):
        sequence = self.sequences[index]
        return {"id": index, "elements": torch.as_tensor(sequence) + 1, "target": int((sequence == 1).sum() % 2)}

    def __len__(self):
        return len(self.sequences)

    def num_tokens(self, index):
        return len(self.sequences[index])

    def size(self, index):
        return self.num_tokens(index)

    def collater(self, samples):
        if not samples:
            return {}  # of a worker that has no batch left
        elements = torch.full((len(samples), self.length), PAD)
        for row, sample in enumerate(samples):
            elements[row, : len(sample["elements"])] = sample["elements"]
        return {
            "id": torch.tensor([sample["id"] for sample in samples]),
            "net_input": {"elements": elements},
            "target": torch.tensor([sample["target"] for sample in samples]),
            "ntokens": sum(len(sample["elements"]) for sample in samples),
            "nsentences": len(samples),
        }


class GeneratedParityDataset(ParityDataset):
    """Uniform random sequences (Xue et al., 2023, section 5.1).

    Args:
        length: L
        size: sequences in an epoch
        seed: two numbers or more that tell runs and splits apart
        fresh: other sequences in every epoch, a function of seed and epoch only
    """

    def __init__(self, length: int, size: int, seed: List[int], fresh: bool):
        super().__init__(length)
        self.seed, self.fresh, self.shape = list(seed), fresh, (size, length)
        self.set_epoch(0)

    def set_epoch(self, epoch):
        rng = np.random.default_rng([*self.seed, epoch if self.fresh else 0])
        self.sequences = rng.integers(-1, 2, self.shape, dtype=np.int64)

    @property
    def can_reuse_epoch_itr_across_epochs(self):
        return not self.fresh


class TextParityDataset(ParityDataset):
    """Sequences of a text file, one a line, elements separated by spaces: ``1 0 -1 1``.

    Args:
        path: the file
        length: L, the longest sequence allowed

    Raises:
        UsageError: for a line that is no such sequence, or a file without any
    """

    def __init__(self, path: str, length: int):
        super().__init__(length)
        self.sequences = []
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                elements = line.split()
                wrong = [element for element in elements if element not in ("1", "0", "-1")]
                if wrong or not elements:
                    found = f"holds {wrong[0]!r}" if wrong else "is empty"
                    raise UsageError(f"{path}, line {number} {found}: write elements 1, 0 and -1 with spaces between")
                if len(elements) > length:
                    raise UsageError(
                        f"{path}, line {number} has {len(elements)} elements: use --sequence-length "
                        f"{len(elements)} or more"
                    )
                self.sequences.append(np.array(elements, dtype=np.int64))
        if not self.sequences:
            raise UsageError(f"{path} is empty: write one sequence a line")

"""The parity of the ones in a sequence over {1, 0, -1}: ``--task parity``."""

import os
import zlib
from dataclasses import dataclass, field
from typing import Optional

from fairseq.dataclass import FairseqDataclass
from fairseq.tasks import FairseqTask, register_task
from omegaconf import II

from fairseq_adaptive.data.parity_dataset import GeneratedParityDataset, TextParityDataset
from fairseq_adaptive.ranges import COUNT, POSITIONS, check_ranges, ranged


@dataclass
class ParityConfig(FairseqDataclass):
    sequence_length: int = ranged(32, POSITIONS, "elements in a sequence; with --parity-data the most")
    train_examples: int = ranged(64000, COUNT, "sequences generated for each epoch of training")
    eval_examples: int = ranged(6400, COUNT, "sequences generated for each other split")
    parity_data: Optional[str] = field(
        default=None,
        metadata={
            "help": "folder with train.txt, valid.txt, ...: one sequence a line, elements separated by spaces "
            "(default: generate sequences)"
        },
    )
    seed: int = II("common.seed")


@register_task("parity", dataclass=ParityConfig)
class ParityTask(FairseqTask):
    """Sequences are generated, new ones in every epoch of training; or read from files.

    What is generated is a function of ``--seed``, split and epoch. The splits for evaluation do not depend on
    ``--seed``, so that runs can be compared.

    Raises:
        UsageError: for numbers out of range
    """

    def __init__(self, cfg, **unused):
        super().__init__(cfg)
        check_ranges(cfg, type(self))

    def load_dataset(self, split, combine=False, **kwargs):
        length = self.cfg.sequence_length
        if self.cfg.parity_data is not None:
            self.datasets[split] = TextParityDataset(os.path.join(self.cfg.parity_data, f"{split}.txt"), length)
        elif split.startswith("train"):
            seed = (self.cfg.seed, zlib.crc32(split.encode()))
            self.datasets[split] = GeneratedParityDataset(length, self.cfg.train_examples, seed, fresh=True)
        else:
            seed = (0, zlib.crc32(split.encode()))
            self.datasets[split] = GeneratedParityDataset(length, self.cfg.eval_examples, seed, fresh=False)

    def max_positions(self):
        return self.cfg.sequence_length

    @property
    def source_dictionary(self):
        return None

    @property
    def target_dictionary(self):
        return None

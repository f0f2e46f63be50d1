"""Pretraining with masked words and the order of two parts: ``--task masked_lm_sop``."""

import logging
import os
import zlib
from dataclasses import dataclass, field

from fairseq import utils
from fairseq.data import data_utils
from fairseq.dataclass import FairseqDataclass
from fairseq.tasks import register_task
from fairseq.tasks.masked_lm import MaskedLMTask
from omegaconf import II, MISSING

from fairseq_adaptive.data.ngram_mask import NgramMask
from fairseq_adaptive.data.sop_dataset import SOPDataset
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.ranges import POSITIONS, POSITIVE_SHARE, SHARE, Range, check_ranges, ranged

logger = logging.getLogger(__name__)


@dataclass
class MaskedLMSOPConfig(FairseqDataclass):
    data: str = field(
        default=MISSING,
        metadata={
            "help": "folder of fairseq-preprocess --only-source, documents separated by empty lines; several, "
            "with colons between, are read in turn, one an epoch"
        },
    )
    tokens_per_sample: int = ranged(512, POSITIONS, "most tokens of a pair of parts, [CLS] and two [SEP] included")
    mask_prob: float = ranged(0.15, POSITIVE_SHARE, "share of the tokens to predict")
    mask_ngram: int = ranged(3, Range(int, 1, 1000), "most words of a masked span (1: single words)")
    leave_unmasked_prob: float = ranged(0.1, SHARE, "share of these tokens that stay as they are")
    random_token_prob: float = ranged(0.1, SHARE, "share of these tokens that become any token")
    seed: int = II("common.seed")


@register_task("masked_lm_sop", dataclass=MaskedLMSOPConfig)
class MaskedLMSOPTask(MaskedLMTask):
    """Masked language modelling and sentence order prediction from documents (Lan et al., 2020).

    Parts, orders and masks of training are a function of ``--seed``, epoch and index; those of other splits are always
    the same, so that runs can be compared. See :class:`~fairseq_adaptive.data.sop_dataset.SOPDataset`.

    Raises:
        UsageError: for flags that contradict each other, and data without documents of two tokens
    """

    orders_parts = True  # samples say which order their two parts have

    def __init__(self, cfg, dictionary=None):
        super().__init__(cfg, dictionary)
        check_ranges(cfg, type(self))
        self.mask = NgramMask(
            self.dictionary, cfg.mask_prob, cfg.mask_ngram, cfg.leave_unmasked_prob, cfg.random_token_prob
        )

    def build_model(self, cfg, from_checkpoint=False):
        model = super().build_model(cfg, from_checkpoint)
        most = model.max_positions()
        if isinstance(most, int) and most < self.cfg.tokens_per_sample:
            raise UsageError(
                f"--max-positions {most} is less than --tokens-per-sample {self.cfg.tokens_per_sample}: "
                "the model could not read what the task makes"
            )
        return model

    def load_dataset(self, split, epoch=1, combine=False, **kwargs):
        paths = utils.split_paths(self.cfg.data)
        path = os.path.join(paths[(epoch - 1) % len(paths)], split)
        lines = data_utils.load_indexed_dataset(path, self.dictionary, combine=combine)
        if lines is None:
            raise FileNotFoundError(f"Dataset not found: {split} ({path})")
        fresh = split.startswith("train")
        seed = (self.cfg.seed if fresh else 0, zlib.crc32(split.encode()))
        try:
            dataset = SOPDataset(
                lines, lines.sizes, self.dictionary, self.cfg.tokens_per_sample, self.mask, seed, fresh
            )
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from None
        self.datasets[split] = dataset
        logger.info(
            f"{split}: {dataset.documents:,} documents in {len(dataset):,} pieces of "
            f"{dataset.sizes.mean():.1f} tokens on average"
        )
        if dataset.documents == 1 and len(dataset) > 1:
            logger.warning(
                f"{split} is a single document: documents are separated by empty lines, and this text has none"
            )

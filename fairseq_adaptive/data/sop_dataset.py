"""Documents as masked pairs of consecutive parts, in order or swapped."""

import logging
from typing import List, Sequence

import numpy as np
import torch
from fairseq.data import Dictionary, FairseqDataset, data_utils

from fairseq_adaptive.data.ngram_mask import NgramMask
from fairseq_adaptive.errors import UsageError

logger = logging.getLogger(__name__)

SPECIAL = 3  # [CLS] A [SEP] B [SEP]


class SOPDataset(FairseqDataset):
    """Pieces of documents for masked language modelling and sentence order prediction (Lan et al., 2020, section 3.1).

    A document is a run of lines between empty ones. It is cut into pieces of up to T - 3 tokens, which together hold
    every token once. Each piece is divided into two parts, at the end of a line where it has one, and the parts change
    places with probability 1/2. The result is ``[CLS] A [SEP] B [SEP]`` (``<s>`` and ``</s>`` in the dictionary). Where
    it is divided, the order and the masks are a function of seed, epoch and index, and of nothing else.

    A document of a single token has no two parts: it is left out.

    Args:
        lines: token ids of every line, its ``</s>`` included; empty lines are a single ``</s>``
        sizes: their lengths, ``[len(lines)]``
        dictionary: of the tokens
        tokens_per_sample: T, the longest result
        mask: draws what is masked
        seed: numbers that tell runs and splits apart
        fresh: other parts, orders and masks in every epoch

    Raises:
        UsageError: when T is below 6, or there is no document of two tokens
    """

    def __init__(
        self,
        lines,
        sizes,
        dictionary: Dictionary,
        tokens_per_sample: int,
        mask: NgramMask,
        seed: Sequence[int],
        fresh: bool,
    ):
        longest = tokens_per_sample - SPECIAL
        if longest < 3:
            raise UsageError(
                f"--tokens-per-sample {tokens_per_sample} leaves no room for two parts beside [CLS] and "
                "two [SEP]: use 6 or more"
            )
        self.lines, self.dictionary, self.mask = lines, dictionary, mask
        self.seed, self.fresh, self.epoch = list(seed), fresh, 0
        lengths = np.asarray(sizes, dtype=np.int64) - 1
        self.line_ends = lengths.cumsum()  # in the stream of all tokens but </s>
        blank = np.flatnonzero(lengths == 0)
        ends = self.line_ends[np.append(blank, len(lengths) - 1)] if len(lengths) else np.zeros(0, dtype=np.int64)
        documents = np.unique(np.append(0, ends))
        starts, ends = documents[:-1], documents[1:]
        whole = ends - starts > 1
        if not whole.any():
            raise UsageError(
                "there is no document of two tokens or more: write documents of several lines, separated by empty lines"
            )
        if not whole.all():
            logger.info(f"{(~whole).sum():,} documents of a single token are left out: they have no two parts")
        self.documents = int(whole.sum())
        self.starts, self.ends = _cut(starts[whole], ends[whole], longest)
        self.sizes = self.ends - self.starts + SPECIAL
        self.order = np.random.default_rng(self.seed).permutation(len(self))

    def set_epoch(self, epoch):
        self.epoch = epoch if self.fresh else 0

    @property
    def can_reuse_epoch_itr_across_epochs(self):
        return not self.fresh  # workers of the data loader would keep the epoch with which they began

    def __len__(self):
        return len(self.starts)

    def __getitem__(self, index):
        rng = np.random.default_rng([*self.seed, self.epoch, int(index)])
        tokens, line_ends = self._piece(int(self.starts[index]), int(self.ends[index]))
        middle = int(rng.choice(line_ends)) if len(line_ends) else int(rng.integers(1, len(tokens)))
        parts = [tokens[:middle], tokens[middle:]]
        swapped = bool(rng.random() < 0.5)
        if swapped:
            parts.reverse()
        cls, sep = [self.dictionary.bos()], [self.dictionary.eos()]
        whole = np.concatenate((cls, parts[0], sep, parts[1], sep))
        segments = np.arange(len(whole)) > len(parts[0]) + 1
        source, target = self.mask(whole, rng)
        return {
            "id": int(index),
            "source": torch.from_numpy(source),
            "target": torch.from_numpy(target),
            "segments": torch.from_numpy(segments).long(),
            "swapped": int(swapped),
        }

    def _piece(self, start, end):
        """Tokens ``start`` to ``end`` (exclusive) of the stream, and where in them, between the ends, a line ends."""
        first, last = np.searchsorted(self.line_ends, (start, end - 1), side="right")
        tokens = np.concatenate([self.lines[line][:-1].numpy() for line in range(first, last + 1)])
        skipped = start - (self.line_ends[first - 1] if first else 0)
        return tokens[skipped : skipped + end - start], self.line_ends[first:last] - start

    def collater(self, samples: List[dict]):
        """A batch: ``net_input.src_tokens`` and ``segments``, ``target`` (B x T, padded on the right; targets are
        padding but where a token is masked) and ``swapped`` (B)."""
        if not samples:
            return {}
        pad = self.dictionary.pad()

        def column(name, fill):
            return data_utils.collate_tokens([sample[name] for sample in samples], fill)

        return {
            "id": torch.tensor([sample["id"] for sample in samples]),
            "net_input": {
                "src_tokens": column("source", pad),
                "src_lengths": torch.tensor([len(sample["source"]) for sample in samples]),
                "segments": column("segments", 0),
            },
            "target": column("target", pad),
            "swapped": torch.tensor([sample["swapped"] for sample in samples]),
            "ntokens": sum(len(sample["source"]) for sample in samples),
            "nsentences": len(samples),
        }

    def num_tokens(self, index):
        return self.sizes[index]

    def num_tokens_vec(self, indices):
        return self.sizes[indices]

    def size(self, index):
        return self.sizes[index]

    def ordered_indices(self):
        """Short pieces first, so that batches have little padding; fairseq shuffles batches."""
        return self.order[np.argsort(self.sizes[self.order], kind="stable")]


def _cut(starts, ends, longest):
    """Where the pieces of documents start and end: ``longest`` tokens but for the last, none of a single token."""
    counts = -(-(ends - starts) // longest)
    last = counts.cumsum() - 1
    number = np.arange(counts.sum()) - np.repeat(last - counts + 1, counts)  # of the piece in its document
    cuts = np.repeat(starts, counts) + number * longest
    stops = np.minimum(cuts + longest, np.repeat(ends, counts))
    single = last[stops[last] - cuts[last] == 1]
    cuts[single] -= 1
    stops[single - 1] -= 1
    return cuts, stops

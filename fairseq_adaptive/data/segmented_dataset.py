"""A text read as parallel streams of consecutive segments, for truncated backpropagation through time."""

import logging

import numpy as np
import torch
from fairseq.data import FairseqDataset, iterators

from fairseq_adaptive.errors import UsageError

logger = logging.getLogger(__name__)


class SegmentedDataset(FairseqDataset):
    """The T tokens of a split, cut into ``rows`` streams that are read side by side, a segment at a time.

    Streams are contiguous and as long as each other, but for the first T % rows, which have one token more. Every token
    is the target of exactly one position. The first input of the text is eos; that of any other stream is the token
    before it. Item ``segment * rows + row`` is a segment of one stream; all segments of one number are of one length.

    Args:
        sentences: the tokens as fairseq-preprocess stored them, a sequence of 1-D tensors
        sizes: their lengths, ``[len(sentences)]``
        tokens_per_sample: length of a segment; the last may be shorter
        rows: number of streams, over all workers

    Raises:
        UsageError: fewer tokens than streams, or segments shorter than a token
    """

    def __init__(self, sentences, sizes, dictionary, split, tokens_per_sample, rows=1):
        self.sentences, self.sizes, self.dictionary, self.split = sentences, np.asarray(sizes), dictionary, split
        self.tokens_per_sample, self.rows = tokens_per_sample, rows
        self.ends = self.sizes.cumsum(dtype=np.int64)
        self.total = int(self.ends[-1]) if len(self.ends) else 0
        if tokens_per_sample < 1:
            raise UsageError(f"--tokens-per-sample is the length of a segment, at least 1, not {tokens_per_sample}")
        if self.total < rows:
            raise UsageError(
                f"the {split} text has {self.total:,} tokens, too few for {rows:,} streams: take a smaller "
                "--batch-size (--batch-size-valid for validation during training) or fewer workers"
            )
        self.row_length = -(-self.total // rows)  # of the longest
        self.segments = -(-self.row_length // tokens_per_sample)

    def with_rows(self, rows):
        """The same text in another number of streams."""
        return SegmentedDataset(self.sentences, self.sizes, self.dictionary, self.split, self.tokens_per_sample, rows)

    def batches(self, batch_size):
        """Items of each batch: ``batch_size`` neighbouring streams; all batches of one segment before the next."""
        return [list(range(first, first + batch_size)) for first in range(0, len(self), batch_size)]

    def __len__(self):
        return self.rows * self.segments

    def __getitem__(self, index):
        segment, row = divmod(int(index), self.rows)
        offset = segment * self.tokens_per_sample
        width = min(self.tokens_per_sample, self.row_length - offset)
        length = self.total // self.rows + (row < self.total % self.rows)
        start = row * (self.total // self.rows) + min(row, self.total % self.rows) + offset
        kept = min(width, length - offset)  # of targets: a stream that is one token shorter ends with an input only
        tokens = self._tokens(start - 1, start + kept)
        return {"id": int(index), "source": tokens[:width], "target": tokens[1:], "offset": offset}

    def _tokens(self, first, end):
        """Tokens ``first`` to ``end`` (exclusive) of the text, ``[end - first]``; number -1 is eos."""
        if first < 0:
            return torch.cat((torch.tensor([self.dictionary.eos()]), self._tokens(0, end)))
        sentence = int(np.searchsorted(self.ends, first, side="right"))
        last = int(np.searchsorted(self.ends, end))
        tokens = torch.cat([self.sentences[i] for i in range(sentence, last + 1)]).long()
        skipped = first - int(self.ends[sentence] - self.sizes[sentence])
        return tokens[skipped : skipped + end - first]

    def collater(self, samples):
        """A fairseq batch; ``target [B, T]`` is padded on the right, ``net_input.src_tokens [B, T]`` is not.

        ``segment`` says where it belongs: ``split``, ``rows`` (of all workers), ``first_row`` (of this batch),
        ``offset`` (tokens of each stream before it) and whether it is the ``last``.
        """
        if not samples:
            return {}
        source = torch.stack([sample["source"] for sample in samples])
        target = torch.full_like(source, self.dictionary.pad())
        for row, sample in enumerate(samples):
            target[row, : len(sample["target"])] = sample["target"]
        offset = samples[0]["offset"]
        return {
            "id": torch.tensor([sample["id"] for sample in samples]),
            "nsentences": len(samples),
            "ntokens": int(target.ne(self.dictionary.pad()).sum()),
            "net_input": {"src_tokens": source, "src_lengths": torch.full((len(samples),), source.size(1))},
            "target": target,
            "segment": {
                "split": self.split,
                "rows": self.rows,
                "first_row": samples[0]["id"] % self.rows,
                "offset": offset,
                "last": offset + source.size(1) == self.row_length,
            },
        }


class SegmentIterator(iterators.EpochBatchIterator):
    """fairseq's iterator over the segments of one worker, in their order.

    A checkpoint says where each stream stood. Resumed with another number of streams or length of segments, the epoch
    goes on at the same share of the text.
    """

    def __init__(self, dataset, batch_size, **kwargs):
        super().__init__(
            dataset,
            dataset.collater,
            dataset.batches(batch_size),
            disable_shuffling=True,
            reuse_dataloader=True,
            **kwargs,
        )

    @property
    def first_batch(self):
        """What fairseq computes on a worker that has run out of batches: it belongs to no stream."""
        return {**super().first_batch, "segment": None}

    def state_dict(self):
        cut = {"rows": self.dataset.rows, "tokens_per_sample": self.dataset.tokens_per_sample}
        return {**super().state_dict(), **cut}

    def load_state_dict(self, state_dict):
        read = state_dict["iterations_in_epoch"]
        share = (
            state_dict.get("rows", 0)
            * state_dict.get("tokens_per_sample", 0)
            / (self.dataset.rows * self.dataset.tokens_per_sample)
        )
        if read and share != 1:
            there = min(int(read * share), len(self) - 1)
            logger.warning(
                f"the checkpoint has read {read} segments of {state_dict.get('tokens_per_sample', '?')} tokens in "
                f"{state_dict.get('rows', '?')} streams; in {self.dataset.rows} streams of segments of "
                f"{self.dataset.tokens_per_sample}, this epoch goes on after segment {there}, so that some tokens may "
                "be read twice in it and others not"
            )
            state_dict = {**state_dict, "iterations_in_epoch": there}
        super().load_state_dict(state_dict)

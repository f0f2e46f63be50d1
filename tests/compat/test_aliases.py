"""What of NumPy fairseq uses is there, and gives what it gave."""

import numpy as np
import pytest
import torch
from fairseq.data import BucketPadLengthDataset, LanguagePairDataset, data_utils
from fairseq.modules import DynamicCRF


def test_masks_without_overlap():
    mask = data_utils.compute_mask_indices((2, 50), None, 0.3, 5, no_overlap=True, min_space=1)
    assert mask.shape == (2, 50) and 0 < mask.sum() <= 100 * 0.5
    assert not hasattr(np, "int") and not hasattr(np, "float")  # only fairseq sees them


def test_conditional_random_field():
    torch.manual_seed(1)
    crf = DynamicCRF(num_embedding=9, low_rank=4, beam_size=4)
    likelihood = crf(torch.randn(2, 5, 9), torch.randint(9, (2, 5)), torch.ones(2, 5, dtype=torch.bool))
    assert likelihood.isfinite().all()


@pytest.mark.parametrize(
    "sizes,count,expected", ((range(1, 101), 4, [25, 50, 75, 100]), ([3, 3, 3, 9], 2, [3, 9]), ([5], 3, [5]))
)
def test_buckets(sizes, count, expected):
    assert data_utils.get_buckets(np.array(sizes), count).tolist() == expected


def test_bucketed_sentences(dictionary):
    sentences = [torch.full((length,), 5) for length in (2, 3, 7, 8)]
    sizes = np.array([len(each) for each in sentences])
    pairs = LanguagePairDataset(
        sentences, sizes, dictionary, sentences, sizes, dictionary, num_buckets=2, left_pad_source=True
    )
    assert isinstance(pairs.src, BucketPadLengthDataset)
    assert [len(pairs[index]["source"]) for index in range(4)] == [3, 3, 8, 8]
    assert pairs.get_batch_shapes() == [(None, 3), (None, 8)]

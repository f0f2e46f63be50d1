"""Samples as the tasks of fairseq make them."""

import pytest
import torch


@pytest.fixture
def masked(batch):
    tokens = batch["prev_output_tokens"]
    target = torch.full_like(tokens, 1)
    target[0, 2], target[1, 5], target[2, 1] = 11, 23, 36
    return {"net_input": {"src_tokens": tokens}, "target": target, "ntokens": int((tokens != 1).sum()), "nsentences": 3}


@pytest.fixture
def pairs(batch):
    return {"net_input": batch, "target": batch["prev_output_tokens"].roll(-1, 1), "ntokens": 16, "nsentences": 3}


@pytest.fixture
def segments(dictionary):
    torch.manual_seed(2)
    tokens = torch.randint(4, 44, (3, 11))
    tokens[1, 7:] = 1
    sample = {"net_input": {"src_tokens": tokens[:, :-1]}, "target": tokens[:, 1:].clone(), "nsentences": 3}
    return {**sample, "ntokens": int((sample["target"] != 1).sum())}

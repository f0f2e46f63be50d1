"""Native steps find the hypotheses of the search that calls modules, and give way where anything is not known."""

import logging
import os

import pytest
import torch

from decoding.test_beam_generator import MODELS, OPTIONS, assert_same, halting, search, shared
from fairseq_adaptive.decoding.native_steps import NativeSteps
from fairseq_adaptive.ops.decoder_step import OP

pytestmark = pytest.mark.skipif(
    OP.obstacle("native", "cpu", torch.float32) is not None,
    reason=f"the library is not there: {OP.obstacle('native', 'cpu', torch.float32)}",
)


@pytest.fixture
def both(dictionary, monkeypatch):
    """``both(models, batch, **options)``: hypotheses of native steps, asked for by name, and of torch's."""

    def both(models, batch, **options):
        found = []
        for kernels in ("native", "torch"):
            monkeypatch.setenv("FAIRSEQ_ADAPTIVE_KERNELS", kernels)
            found.append(search(models, dictionary, batch, **options))
        return found

    return both


FIT = [flags for flags in MODELS if not {"adaptive_softmax_cutoff", "decoder_input_dim"} & set(flags)]


@pytest.mark.parametrize("flags", FIT, ids=lambda flags: "-".join(flags) or "plain")
@pytest.mark.parametrize("fast", (False, True))
def test_equals_torch(build, batch, both, flags, fast):
    assert_same(*both([shared(build, dtype=torch.float32, **flags)], batch, fast=fast))

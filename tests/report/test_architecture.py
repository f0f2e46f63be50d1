import argparse
import itertools

import pytest
import torch

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.report import architecture
from fairseq_adaptive.report.architecture import blocks_within, compare_compute, found_blocks, found_layout


def test_layout_is_that_of_the_most_probable_kinds():
    probabilities = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.1, 0.7], [0.1, 0.6, 0.3], [0.3, 0.4, 0.3]])
    assert found_blocks(probabilities) == "aiff"
    assert found_layout("aiff") == "aff"
    with pytest.raises(UsageError, match="identities only"):
        found_layout("iii")


def test_compute_is_that_of_the_blocks():
    options = argparse.Namespace(
        decoder_embed_dim=32,
        decoder_ffn_embed_dim=64,
        decoder_attention_heads=2,
        decoder_head_dim=None,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        decoder_normalize_before=False,
        memory_length=8,
        clamp_length=0,
        same_length=False,
        untie_relative_bias=False,
        adaptive_softmax_cutoff="10,20",
        adaptive_softmax_factor=1.0,
        adaptive_softmax_dropout=0.0,
        share_decoder_input_output_embed=True,
        tie_adaptive_proj=True,
        init_std=0.02,
    )
    flops = [compare_compute(options, blocks, 2, 8, rounds=1) for blocks in ("afaf", "fiif", "afii")]
    assert all(min(found["seconds"]) > 0 for found in flops)
    whole, feed_forward, pair = (found["flops"][0] for found in flops)
    assert all(found["flops"][1] == whole for found in flops)
    # blocks x tokens x weights x multiply-add x (forward and, for inputs and weights, backward)
    assert feed_forward == 2 * (2 * 8) * (2 * 32 * 64) * 2 * 3
    assert pair == whole / 2


@pytest.mark.parametrize("chosen", (0, 2, 3))
def test_untouched_search_has_no_layout(chosen, monkeypatch):
    """Equal probabilities would be read as attention in every block."""
    logits = torch.zeros(3, 3)
    logits[:chosen, 1] = 0.1
    state = {"model": {"decoder.architecture": logits}, "cfg": {"model": {"blocks": 3}}}
    monkeypatch.setattr(architecture, "load_checkpoint", lambda path: state)
    monkeypatch.setattr(architecture, "model_options", lambda state: state["cfg"]["model"])
    if chosen == 3:
        assert architecture.found_blocks(architecture.load_search("search.pt")[0]) == "fff"
        return
    with pytest.raises(
        UsageError, match=f"search.pt has not chosen among the kinds of {3 - chosen} of 3 blocks: go on"
    ):
        architecture.load_search("search.pt")


def test_blocks_within_a_share():
    """The most probable of all layouts that cost it, as trying every one finds them; and what no layout costs."""
    pytest.importorskip("scipy")
    probabilities = torch.rand(6, 3, generator=torch.Generator().manual_seed(1)).softmax(-1)
    costs = {"a": 0.7, "f": 1.3}
    for share in (0.55, 0.7, 1.0):
        every = ("".join(each) for each in itertools.product("afi", repeat=6))
        near = [each for each in every if abs(sum(costs.get(kind, 0) for kind in each) / 6 / share - 1) <= 0.03]
        gains = {each: sum(probabilities[i, "afi".index(kind)].log() for i, kind in enumerate(each)) for each in near}
        assert blocks_within(probabilities, costs, share) == max(gains, key=gains.get)
    with pytest.raises(UsageError, match="no layout of 6 blocks costs that share"):
        blocks_within(probabilities, costs, 2.0)

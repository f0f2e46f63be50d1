import argparse
import sys

import numpy as np
import pytest
import torch

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.report import architecture
from fairseq_adaptive.report.architecture import (
    animate_course,
    compare_compute,
    found_blocks,
    found_layout,
    plot_course,
    read_probabilities,
    read_scalars,
)

SIMPLE = """2026-11-22 02:43:44 | INFO | fairseq_cli.train | task: SegmentedLanguageModelingTask
2026-11-22 02:43:44 | INFO | train_inner | epoch 001:  25 / 50 loss=9, block_0_a=0.33, block_0_f=0.34, block_0_i=0.33, \
block_1_a=0.2, block_1_f=0.5, block_1_i=0.3, ppl=1, num_updates=25, lr=0.1
2026-11-22 02:43:50 | INFO | valid | epoch 001 | valid on 'valid' subset | loss 3 | block_0_a 0.9 | block_0_f 0.1 | \
block_0_i 0 | block_1_a 0.9 | block_1_f 0.1 | block_1_i 0 | num_updates 30
2026-11-22 02:43:54 | INFO | train_inner | epoch 001:  50 / 50 loss=8, block_0_a=0.4, block_0_f=0.5, block_0_i=0.1, \
block_1_a=0.1, block_1_f=0.9, block_1_i=0, ppl=1, num_updates=50, lr=0.1
2026-11-22 02:43:54 | INFO | train | epoch 001 | loss 8 | block_0_a 0.6 | block_0_f 0.3 | block_0_i 0.1 | block_1_a 0.5 | \
block_1_f 0.5 | block_1_i 0 | ppl 1 | num_updates 50 | lr 0.1
"""
JSON = """2026-11-22 02:43:44 | INFO | train_inner | {"epoch": 1, "loss": "9", "block_0_a": "0.33", "block_0_f": "0.34", \
"block_0_i": "0.33", "block_1_a": "0.2", "block_1_f": "0.5", "block_1_i": "0.3", "num_updates": "25"}
2026-11-22 02:43:54 | INFO | train_inner | {"epoch": 1, "loss": "8", "block_0_a": "0.4", "block_0_f": "0.5", \
"block_0_i": "0.1", "block_1_a": "0.1", "block_1_f": "0.9", "block_1_i": "0", "num_updates": "50"}
"""
COURSE = [[[0.33, 0.34, 0.33], [0.2, 0.5, 0.3]], [[0.4, 0.5, 0.1], [0.1, 0.9, 0.0]]]


@pytest.mark.parametrize("log", [SIMPLE, JSON], ids=("simple", "json"))
def test_course_is_read_from_a_log(log, tmp_path):
    (tmp_path / "log").write_text(log)
    updates, course = read_probabilities(tmp_path / "log")
    assert updates.tolist() == [25, 50]
    np.testing.assert_array_equal(course, COURSE)


def test_log_without_a_search_is_refused(tmp_path):
    (tmp_path / "log").write_text("2026-11-22 | INFO | train_inner | loss=9, num_updates=25\n")
    with pytest.raises(UsageError, match="no probabilities of blocks"):
        read_probabilities(tmp_path / "log")


@pytest.mark.parametrize("prefix", ["", "search_"])
def test_course_is_read_from_tensorboard(prefix, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from torch.utils.tensorboard import SummaryWriter

    for part in ("train_inner", "train"):  # fairseq's folders; means over an epoch do not count
        writer = SummaryWriter(str(tmp_path / part))
        for update, row in zip((25, 50), COURSE):
            for block, values in enumerate(row):
                for kind, value in zip("afi", values):
                    writer.add_scalar(f"{prefix}block_{block}_{kind}", value if part == "train_inner" else 9, update)
            writer.add_scalar("loss", 1.0, update)
        writer.close()
    updates, course = read_scalars(tmp_path)
    assert updates.tolist() == [25, 50]
    np.testing.assert_allclose(course, COURSE, atol=1e-7)
    with pytest.raises(UsageError, match="no probabilities of blocks"):
        read_scalars(tmp_path / "train")


def test_without_tensorboard_the_log_is_asked_for(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorboard.backend.event_processing.event_accumulator", None)
    with pytest.raises(UsageError, match="pip install tensorboard, or give the log"):
        read_scalars(tmp_path)


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


def test_pictures_are_written(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra plots)")
    from PIL import Image

    updates, course = np.array([25, 50]), np.array(COURSE)
    plot_course(updates, course, tmp_path / "search.png")
    animate_course(updates, course, tmp_path / "search.gif")
    with Image.open(tmp_path / "search.png") as picture:
        colours = picture.convert("RGB").getcolors(2**20)
        assert len(colours) > 50
    with Image.open(tmp_path / "search.gif") as animation:
        assert animation.n_frames == 2


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

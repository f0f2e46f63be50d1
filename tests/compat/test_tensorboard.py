"""Shares of whole numbers reach TensorBoard as a histogram."""

import pytest

pytest.importorskip("tensorboard", reason="tensorboard is not installed")

from fairseq.logging import progress_bar
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def test_lengths_of_tapes_are_a_histogram(tmp_path, monkeypatch):
    monkeypatch.setattr(progress_bar, "_tensorboard_writers", {})
    bar = progress_bar.TensorboardProgressBarWrapper(progress_bar.NoopProgressBar([]), str(tmp_path))
    bar.log({"loss": 1.0, "tape_lens": "3:0.250 5:0.750", "note": "as 3:0.2", "num_updates": 7}, "train_inner")
    for writer in progress_bar._tensorboard_writers.values():
        writer.close()
    events = EventAccumulator(str(tmp_path / "train_inner"), size_guidance={"histograms": 0}).Reload()
    assert events.Tags()["histograms"] == ["tape_lens"] and events.Tags()["scalars"] == ["loss"]
    (event,) = events.Histograms("tape_lens")
    value = event.histogram_value
    assert event.step == 7 and (value.min, value.max, value.num, value.sum) == (3, 5, 1, 4.5)
    heights = dict(zip(value.bucket_limit, value.bucket))
    assert {limit: share for limit, share in heights.items() if share} == {3.5: 0.25, 5.5: 0.75}
    assert list(heights) == [2.5, 3.5, 4.5, 5.5]

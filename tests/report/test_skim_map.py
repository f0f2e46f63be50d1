"""Which kinds of tokens are skimmed: counted by hand, as a table and as a map."""

import pytest

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.report.shading import Sentence
from fairseq_adaptive.report.skim_map import format_shares, kept_shares, plot_shares, shares_figure

SENTENCES = [
    Sentence(["[CLS]", "▁a", "▁film", "[SEP]"], [3, 1, 3, 2], 3, "skimmed before layer", "kept"),
    Sentence(["[CLS]", "▁the", "[SEP]"], [3, 2, 3], 3, "skimmed before layer", "kept"),
]


def test_shares_by_hand():
    found = kept_shares(SENTENCES)
    assert found == {
        "whole word": (3, [2 / 3, 1 / 3]),
        "[CLS]": (2, [1, 1]),
        "[SEP]": (2, [1, 0.5]),
        "all": (7, [6 / 7, 4 / 7]),
    }
    assert "| tokens computed by layer | tokens | 1 | 2 |\n" in format_shares(found)
    assert "| whole word | 3 | 0.67 | 0.33 |\n" in format_shares(found)
    with pytest.raises(UsageError, match="plot depth"):
        kept_shares([Sentence(["▁a"], [1], 2)])
    with pytest.raises(UsageError, match="nothing to count"):
        kept_shares([])


def test_map(tmp_path):
    pytest.importorskip("matplotlib")
    found = kept_shares(SENTENCES)
    panel = shares_figure(found).axes[0]
    assert panel.get_xlabel() == "layer" and [each.get_text() for each in panel.get_xticklabels()] == ["1", "2"]
    assert [each.get_text() for each in panel.get_yticklabels()][0] == "whole word (3)"
    assert panel.images[0].get_array().shape == (4, 2) and len(panel.texts) == 8
    assert panel.texts[0].get_position() == (0, 0) and panel.texts[0].get_text() == "0.67"
    plot_shares(found, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")

import pytest
import torch

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules.policies.tape import Reading
from fairseq_adaptive.report.tape_map import map_figure, plot_map, read_map


class Model:
    """Reads entry ``first`` of a bank of 6, and in rows with first > 2 entry 5, too; chooses the class first % 2."""

    def __call__(self, first):
        long = first > 2
        entries = torch.stack((first, torch.where(long, 5, -1)), 1).unsqueeze(-1)  # B x 2 x 1
        live = torch.stack((torch.ones_like(long), long), 1)
        reading = Reading(torch.zeros(len(first), 2, 4), live, torch.zeros(len(first)), entries, entries * 0.0)
        extra = {"tape": reading, "bank_size": 6, "bank_shared": False, "max_tokens": 3}
        return torch.eye(2)[first % 2], extra


def batch(first, target):
    return {"net_input": {"first": torch.tensor(first)}, "target": torch.tensor(target)}


def test_counts_what_every_class_reads():
    counted = read_map(Model(), [batch([0, 1, 3], [0, 1, 0]), batch([4], [0])], 2)
    assert counted.reads.tolist() == [[1, 0, 0, 1, 1, 2], [0, 1, 0, 0, 0, 0]]
    assert counted.rows.tolist() == [3, 1]
    assert counted.lengths.tolist() == [[0, 1, 2, 0], [0, 1, 0, 0]]
    assert counted.correct == 3 and counted.mean_length == 1.5


def test_draws_a_map_for_each_class(tmp_path):
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    counted = read_map(Model(), [batch([0, 1, 3], [0, 1, 0])], 2)
    plot_map(counted, (2, 3), tmp_path / "map.png", ["a", "b"], torch.rand(2, 8, 8))
    picture = image.open(tmp_path / "map.png")
    assert picture.format == "PNG" and min(picture.size) > 100


def test_a_map_lies_over_its_image_under_the_name_of_the_class():
    pytest.importorskip("matplotlib")
    counted = read_map(Model(), [batch([0, 1, 3], [0, 1, 0])], 2)
    figure = map_figure(counted, (2, 3), ["shirt", "\x1bboot"], torch.rand(2, 8, 9))
    everything, *classes = [panel for panel in figure.axes if panel.get_title()]
    assert everything.get_title() == "all, tape of 1.33" and len(everything.images) == 2
    assert [panel.get_title() for panel in classes] == ["shirt", "\\x1bboot"]
    for reads, rows, panel in zip(counted.reads, counted.rows, classes):
        image, cells = panel.images
        assert image.get_array().shape == (8, 9) and cells.get_array().shape == (2, 3)
        assert image.get_extent() == cells.get_extent()
        assert [cells.cmap(share)[3] for share in (0.0, 1.0)] == [0.0, 0.85]  # what is not read does not hide the image
        assert cells.get_array().tolist() == (reads / rows).view(2, 3).tolist()
    many = map_figure(counted._replace(reads=torch.ones(13, 6), rows=torch.ones(13)), (2, 3))
    assert len([panel for panel in many.axes if panel.get_title()]) == 14


def test_names_what_cannot_be_shown():
    with pytest.raises(UsageError, match="the split is empty"):
        read_map(Model(), [], 2)
    with pytest.raises(UsageError, match="no tape: train one with --tape-tokens"):
        read_map(lambda first: (torch.eye(2), {"tape": None}), [batch([0, 1], [0, 1])], 2)

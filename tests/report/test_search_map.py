"""The course of a search: read from logs and TensorBoard, and what its pictures say."""

import sys

import numpy as np
import pytest

from fairseq_adaptive import commands
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.report.search_map import Course, course_figure, read_course, read_probabilities, read_scalars

SIMPLE = """2026-11-22 02:43:44 | INFO | fairseq_cli.train | task: SegmentedLanguageModelingTask
2026-11-22 02:43:44 | INFO | train_inner | epoch 001:  25 / 50 loss=9, block_0_a=0.33, block_0_f=0.34, block_0_i=0.33, \
block_1_a=0.2, block_1_f=0.5, block_1_i=0.3, ppl=1, temperature=0.9, num_updates=25, lr=0.1
2026-11-22 02:43:50 | INFO | valid | epoch 001 | valid on 'valid' subset | loss 3 | block_0_a 0.9 | block_0_f 0.1 | \
block_0_i 0 | block_1_a 0.9 | block_1_f 0.1 | block_1_i 0 | num_updates 30
2026-11-22 02:43:54 | INFO | train_inner | epoch 001:  50 / 50 loss=8, block_0_a=0.4, block_0_f=0.5, block_0_i=0.1, \
block_1_a=0.1, block_1_f=0.9, block_1_i=0, ppl=1, num_updates=50, lr=0.1
2026-11-22 02:43:54 | INFO | train | epoch 001 | loss 8 | block_0_a 0.6 | block_0_f 0.3 | block_0_i 0.1 | block_1_a 0.5 | \
block_1_f 0.5 | block_1_i 0 | ppl 1 | num_updates 50 | lr 0.1
"""
JSON = """2026-11-22 02:43:44 | INFO | train_inner | {"epoch": 1, "loss": "9", "block_0_a": "0.33", "block_0_f": "0.34", \
"block_0_i": "0.33", "block_1_a": "0.2", "block_1_f": "0.5", "block_1_i": "0.3", "temperature": "0.9", "num_updates": "25"}
2026-11-22 02:43:54 | INFO | train_inner | {"epoch": 1, "loss": "8", "block_0_a": "0.4", "block_0_f": "0.5", \
"block_0_i": "0.1", "block_1_a": "0.1", "block_1_f": "0.9", "block_1_i": "0", "num_updates": "50"}
"""
COURSE = [[[0.33, 0.34, 0.33], [0.2, 0.5, 0.3]], [[0.4, 0.5, 0.1], [0.1, 0.9, 0.0]]]


@pytest.mark.parametrize("log", [SIMPLE, JSON], ids=("simple", "json"))
def test_course_is_read_from_a_log(log, tmp_path):
    (tmp_path / "log").write_text(log)
    updates, course, temperatures = read_course(tmp_path / "log")
    assert updates.tolist() == [25, 50]
    np.testing.assert_array_equal(course, COURSE)
    np.testing.assert_array_equal(temperatures, [0.9, np.nan])


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
            writer.add_scalar(f"{prefix}temperature", 25 / update, update)
        writer.close()
    updates, course, temperatures = read_course(tmp_path)
    assert updates.tolist() == [25, 50]
    np.testing.assert_allclose(course, COURSE, atol=1e-7)
    assert temperatures.tolist() == [1.0, 0.5]
    with pytest.raises(UsageError, match="no probabilities of blocks"):
        read_scalars(tmp_path / "train")


def test_without_tensorboard_the_log_is_asked_for(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorboard.backend.event_processing.event_accumulator", None)
    with pytest.raises(UsageError, match="pip install tensorboard, or give the log"):
        read_scalars(tmp_path)


@pytest.fixture
def course():
    drawn = np.random.default_rng(1).dirichlet((1, 1, 1), (5, 4))
    drawn[-1, :, 0], drawn[-1, :, 2] = 0.01, (0.9, 0.1, 0.9, 0.1)
    drawn[-1, :, 1] = 1 - drawn[-1, :, 0] - drawn[-1, :, 2]
    return Course(np.array([10, 20, 30, 40, 50]), drawn, np.linspace(1, 0.2, 5))


def test_map(course):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra plots)")
    figure = course_figure(course)
    *maps, temperature = [panel for panel in figure.axes if panel.get_label() != "<colorbar>"]
    assert [panel.get_title() for panel in maps] == ["attention", "feed-forward", "identity"]
    assert maps[0].get_ylabel() == "block" and maps[0].get_yticks().tolist() == [0, 1, 2, 3]
    for column, panel in enumerate(maps):
        (cells,) = panel.collections
        assert cells.get_array().size == 5 * 4  # one for each update and block
        np.testing.assert_array_equal(np.asarray(cells.get_array()).reshape(4, 5), course.probabilities[:, :, column].T)
        corners = cells.get_coordinates()
        assert ((corners[1:, 0, 1] + corners[:-1, 0, 1]) / 2).tolist() == [0, 1, 2, 3]  # numbers at their centres
        assert ((corners[0, 1:, 0] + corners[0, :-1, 0]) / 2).tolist() == [10, 20, 30, 40, 50]
    assert temperature.get_ylabel() == "temperature"
    assert temperature.lines[0].get_ydata().tolist() == course.temperatures.tolist()
    assert figure.get_suptitle() == "50 updates: --layout ff"
    assert len(course_figure(course._replace(temperatures=np.full(5, np.nan))).axes) == 4
    assert course._replace(probabilities=np.ones((1, 2, 3)) * (0.1, 0.1, 0.8)).layout() == "identities only"


def test_command_draws_a_map_and_an_animation_that_rests(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra plots)")
    from PIL import Image

    (tmp_path / "log").write_text(SIMPLE)
    words = ["plot", "search", str(tmp_path / "log"), "--output", str(tmp_path / "a.png")]
    commands.main([*words, "--animation", str(tmp_path / "a.gif")])
    assert "2 moments up to 50 updates: --layout ff" in capsys.readouterr().out
    with Image.open(tmp_path / "a.png") as still, Image.open(tmp_path / "a.gif") as moving:
        assert still.size[0] / moving.size[0] == pytest.approx(110 / 80, rel=0.01)  # the same figure
        assert len(still.convert("RGB").getcolors(2**20)) > 50
        lasts = []
        for frame in range(moving.n_frames):
            moving.seek(frame)
            lasts.append(moving.info["duration"])
    assert len(lasts) == 2 and lasts[-1] >= 3000 > lasts[0]


def test_what_is_no_search(tmp_path):
    for path, why in ((tmp_path / "nothing", "is missing"), (tmp_path, "no probabilities of blocks")):
        with pytest.raises(UsageError, match=why):
            commands.main(["plot", "search", str(path), "--output", str(tmp_path / "a.png")])
    assert not list(tmp_path.iterdir())

"""Quality over measured cost, from reports: what is read, what is refused, what the picture says."""

import copy
import json

import pytest

from fairseq_adaptive import commands
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.report.tradeoff import read_report, series, tradeoff_figure


def model(name, seconds, quality, dense=None, macs=4e6):
    counterpart = (
        None if dense is None else {"seconds": dense, "multiply_adds": {"total": 8e6}, "peak_memory_bytes": 2**21}
    )
    return {
        "checkpoint": f"runs/{name}/checkpoint_best.pt",
        "texts": 10,
        "seconds": seconds,
        "peak_memory_bytes": 2**20,
        "multiply_adds": {"total": macs},
        "quality": quality,
        "counterpart": counterpart,
    }


def report(*models):
    where = {"subset": "valid", "batch_size": 8, "device": "cpu", "threads": 1}
    return {**where, "models": list(models)}


ONE = report(
    model("slow", 0.5, {"loss": 1.0, "accuracy": 90.0}), model("fast", 0.1, {"loss": 2.0, "accuracy": 80}, 0.4)
)
TWO = report(model("other", 0.2, {"accuracy": 85.5, "loss": 1.5, "extra": 3.0}))


def test_points():
    found = series([ONE, TWO])
    assert found["quality"] == "accuracy"
    assert [[(point.cost, point.quality) for point in points] for points in found["points"]] == [
        [(10.0, 80.0), (50.0, 90.0)],
        [(20.0, 85.5)],
    ]
    assert found["points"][0][0].name == "fast" and found["points"][0][0].dense == 40.0
    assert series([ONE], "multiply-adds", "loss")["points"][0][0].cost == 0.4
    assert [point.dense for point in series([ONE], "memory")["points"][0]] == [None, 2.0]
    assert series([TWO], quality="extra")["points"][0][0].quality == 3.0


@pytest.mark.parametrize(
    "changed, why",
    (
        ({"device": "cuda"}, "their device is cpu and cuda; measure them alike"),
        ({"subset": "test"}, "their subset is valid and test"),
        ({"models": [model("none", 1, None)]}, "no quality in common: make the reports without --no-quality"),
        ({"models": [{**TWO["models"][0], "peak_memory_bytes": None}]}, "other/checkpoint_best.pt has no memory"),
    ),
)
def test_what_does_not_compare_is_refused(changed, why):
    with pytest.raises(UsageError, match=why):
        series([ONE, {**TWO, **changed}], "memory")
    with pytest.raises(UsageError, match="not every model has extra: choose one of loss, accuracy"):
        series([ONE, TWO], quality="extra")


def test_picture():
    pytest.importorskip("matplotlib")
    panel = tradeoff_figure([ONE, TWO], ["here", "there"]).axes[0]
    assert panel.get_xlabel() == "ms a text (valid, batches of 8, cpu)"
    assert panel.get_ylabel() == "accuracy (higher is better)"
    assert [each.get_text() for each in panel.texts] == [name for name in ("fast", "slow", "other")]
    legend = [each.get_text() for each in panel.get_legend().get_texts()]
    assert legend == ["here", "there", "cost with all policies off"]
    assert panel.lines[0].get_xydata().tolist() == [[10, 80], [50, 90]] and panel.get_xlim()[0] == 0
    lower = tradeoff_figure([ONE], ["here"], "memory", "loss").axes[0]
    assert (lower.get_xlabel().split(" (")[0], lower.get_ylabel()) == ("peak memory, MiB", "loss (lower is better)")


def test_command(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for name, content in (("a", ONE), ("b", TWO), ("wrong", {"models": []})):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    words = ["plot", "tradeoff", f"first={tmp_path}/a.json", str(tmp_path / "b.json"), "--output"]
    commands.main([*words, str(tmp_path / "a.png")])
    out = capsys.readouterr().out
    assert "first\tfast\ttime 10\taccuracy 80\n" in out and out.count("\n") == 4
    assert "\nb\tother\t" in out and (tmp_path / "a.png").stat().st_size > 1000
    damaged = copy.deepcopy(ONE)
    del damaged["models"][0]["seconds"]
    (tmp_path / "damaged.json").write_text(json.dumps(damaged))
    for name in ("wrong", "damaged"):
        with pytest.raises(UsageError, match=f"{name}.json was not written by fairseq-adaptive report --json"):
            read_report(tmp_path / f"{name}.json")

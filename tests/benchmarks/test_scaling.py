"""Exponents of times, points that curves share, and points that take too much."""

import json
import sys

import pytest

from fairseq_adaptive.errors import UsageError


@pytest.fixture
def scaling(script):
    return script("scaling")


def test_exponents_are_those_of_the_upper_half(scaling):
    sizes = [128, 256, 512, 1024, 2048, 4096]
    assert scaling.exponent(sizes, [3 * size**1.7 for size in sizes]) == pytest.approx(1.7)
    bent = [100.0, 100.0, 100.0, *(size**2 for size in sizes[3:])]
    assert scaling.exponent(sizes, bent) == pytest.approx(2)
    assert scaling.exponent([1, 2, 4], [9, 2, 4]) == pytest.approx(1)
    assert scaling.exponent([4, 2], [8, 2]) == pytest.approx(2)
    assert scaling.exponent([], []) is None and scaling.exponent([4], [1.0]) is None


def test_curves_share_points_and_stock_models(scaling):
    all_curves = scaling.curves(list(scaling.FAMILIES), list(scaling.SIZES), small=False)
    keys = {(curve.model, curve.step, curve.axis) for curve in all_curves}
    assert len(keys) == len(all_curves)
    assert ("transformer", "training", "length") in keys and ("transformer_lm", "inference", "depth") in keys
    assert ("adatape_vit", "training", "vocabulary") not in keys and ("albert_act", "inference", "workers") not in keys
    points = [point for curve in all_curves for point in curve.points.values()]
    assert len(set(points)) < len(points) * 0.9
    one = next(curve for curve in all_curves if (curve.model, curve.axis) == ("adatape_vit", "length"))
    assert [point.real_length for point in one.points.values()] == [121, 256, 529, 1024, 2025, 4096]


def test_a_table_has_the_exponents_without_what_was_left_out(scaling):
    all_curves = scaling.curves(["shared_transformer"], ["length", "workers"], small=False)
    found = {}
    for curve in all_curves:
        for point in curve.points.values():
            power = 2 if point.model == "shared_transformer" else 1
            seconds = {
                "clock": {"least": point.length**power * point.workers**0.5},
                "processor": {"least": point.length},
            }
            found[point] = {"seconds": seconds, "peak_mib": 300 + point.length * point.workers, "start_mib": 300}
            if point.length == 4096:
                found[point] = {"left_out": "needs more than 16 GiB"}
    lines = scaling.table(all_curves, found).split("\n")
    assert lines[0] == "| model | step | length: time | memory | workers: time | memory |"
    assert "| shared_transformer | training | 2.00 | 1.00 | 0.50 | 1.00 |" in lines
    assert "| transformer (stock) | inference | 1.00 | 1.00 | - | - |" in lines
    by_processor = scaling.table(all_curves, found, "processor").split("\n")  # workers stay by the clock
    assert "| shared_transformer | training | 1.00 | 1.00 | 0.50 | 1.00 |" in by_processor
    figure = scaling.figure_of(all_curves, found)
    drawn = {line.get_label(): line for line in figure.axes[0].get_lines()}
    assert list(drawn["shared_transformer"].get_xdata()) == [128, 256, 512, 1024, 2048]
    assert drawn["transformer"].get_linestyle() == "--"


def test_what_takes_too_much_is_ended(scaling):
    def watched(program, memory=16.0, seconds=60.0):
        return scaling.watched([[sys.executable, "-c", program]], [None], memory, seconds)

    assert watched("pass") is None
    assert watched("import time; time.sleep(60)", seconds=0.2) == "takes more than 0.2 seconds"
    large = "import time; x = bytearray(200 * 2**20); time.sleep(60)"
    assert watched(large, memory=0.1) == "needs more than 0.1 GiB"
    with pytest.raises(UsageError, match="ended with status 3"):
        watched("raise SystemExit(3)")


def test_larger_points_are_left_out_with_the_first(scaling, tmp_path, monkeypatch, capsys, call):
    asked = []

    def measure(point, part, args):
        asked.append(point)
        if point.length > 8:
            return "needs more than 16 GiB"
        seconds = {"clock": {"median": 1.0, "least": 1.0}}
        part.write_text(json.dumps({**point._asdict(), "seconds": seconds, "peak_mib": 2, "start_mib": 1}))

    monkeypatch.setattr(scaling, "measure", measure)
    monkeypatch.setattr(scaling, "SMALL", {**scaling.SMALL, "length": (8, 16, 32)})
    flags = ("--small", "--models", "adatape_parity", "--only", "length", "--parts", tmp_path / "parts", "--output")
    call(scaling, *flags, tmp_path / "one.json")
    assert [(point.step, point.length) for point in asked] == [
        (step, length) for step in ("training", "inference") for length in (8, 16)
    ]
    assert capsys.readouterr().out.count("left out: needs more than 16 GiB") == 4
    call(scaling, *flags, tmp_path / "two.json")
    assert len(asked) == 4  # what is there is kept
    one, two = (json.loads((tmp_path / name).read_text())["points"] for name in ("one.json", "two.json"))
    assert one == two and len(one) == 6


def test_a_point_is_measured(scaling, tmp_path, monkeypatch):
    point = scaling.Point("adatape_parity", "training", length=36, depth=1, batch=2, vocabulary=40)
    monkeypatch.setattr(
        sys, "argv", ["scaling.py", "--small", "--output", "x", "--parts", str(tmp_path), "--rounds", "2"]
    )
    (tmp_path / "data").mkdir()
    assert scaling.measure(point, tmp_path / "found.json", scaling.parse()) is None
    found = json.loads((tmp_path / "found.json").read_text())
    assert scaling.Point(**{name: found[name] for name in point._fields}) == point
    assert found["tokens"] == 2 * 36
    assert 0 < found["seconds"]["clock"]["least"] <= found["seconds"]["clock"]["most"] < 60
    assert found["peak_mib"] > found["start_mib"] > 50

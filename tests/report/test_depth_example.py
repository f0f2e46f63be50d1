"""examples/depth: sheets whose values and depths are what they say, commands that real parsers take, results that are drawn."""

import collections
import json
import random
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fairseq import options, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf

import fairseq_adaptive
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules import LayerStack

FOLDER = Path(__file__).parents[2] / "examples" / "depth"
USER_DIR = str(Path(fairseq_adaptive.__file__).parent)


@pytest.fixture(scope="module", autouse=True)
def example():
    """The modules of the example, which lie beside each other."""
    sys.path.insert(0, str(FOLDER))
    import depth
    import layers
    import plot_nesting
    import sheets

    yield SimpleNamespace(depth=depth, layers=layers, plot=plot_nesting, sheets=sheets)
    sys.path.remove(str(FOLDER))
    for name in ("depth", "layers", "plot_nesting", "sheets"):
        del sys.modules[name]


def look_up(text):
    """Value and number of look-ups of the asked cell, one look-up after the other."""
    words, cell, total = text.split(), 0, 0
    for count in range(len(words)):
        formula = re.fullmatch(r"=(\d+)(?:\+(\d))?", words[cell])
        if formula is None:
            return (int(words[cell]) + total) % 10, count
        cell, total = int(formula[1]), total + int(formula[2] or 0)
    raise AssertionError(f"{text!r} goes round in circles")


@pytest.mark.parametrize("addends", (1, 3))
def test_values_and_depths(example, addends):
    wanted, seen = [1, 2, 5, 9] * 50, set()
    rows = list(example.sheets.sheets("a", 22, wanted, seen, addends))
    assert [look_up(text) for text, _ in rows] == [(value, depth) for (_, value), depth in zip(rows, wanted)]
    assert all(len(text.split()) == 22 for text, _ in rows)  # length says nothing of depth
    assert {text for text, _ in rows} == seen and len(seen) == len(rows)
    for depth in set(wanted):  # nor does depth of the label
        counts = collections.Counter(value for (_, value), each in zip(rows, wanted) if each == depth)
        assert counts == dict.fromkeys(range(10), 5)
    again = list(example.sheets.sheets("a", 22, wanted, set(), addends))
    assert again == rows and list(example.sheets.sheets("b", 22, wanted, set(), addends)) != rows
    assert not {text for text, _ in example.sheets.sheets("a", 22, wanted, seen, addends)} & {text for text, _ in rows}


def test_depths_of_all_cells(example):
    assert example.sheets.depths("=2 7 =1 =0+2 =1+1".split()) == [2, 0, 1, 3, 1]
    draw = random.Random(1)
    for _ in range(50):
        words = example.sheets.sheet(draw, 18, 6, 3)
        found = example.sheets.depths(words)
        assert found[0] == 6 and "=0" not in words
        assert found == [look_up(" ".join([words[cell], *words[1:]]))[1] for cell in range(18)]


@pytest.mark.parametrize("depth", (1, 4, 7))
def test_nothing_else_tells_label_or_depth(example, depth):
    draw = random.Random(depth)
    for _ in range(50):
        words = example.sheets.sheet(draw, 18, depth, 3)
        digits = [word for word in words if word.isdecimal()]
        assert len(words) == 18 and len(digits) == len(set(digits)) == 4
        found, on_the_way, cell = example.sheets.depths(words), set(), 0
        while words[cell].startswith("="):
            on_the_way.add(cell := int(words[cell][1:]))
        # a cell of the same depth that nothing of the asked one's chain needs
        assert any(each == depth and place not in on_the_way and place for place, each in enumerate(found))
        assert len(on_the_way) == depth


def test_train_becomes_deeper(example):
    found = example.sheets.growing(10_000, 4)
    first = [found.index(depth) for depth in (1, 2, 3, 4)]
    assert first == sorted(first) and first[0] == 0 and first[1] == pytest.approx(2400, abs=5)
    assert first[3] == pytest.approx(4800, abs=5) and collections.Counter(found[6000:]) == dict.fromkeys(
        range(1, 5), 1000
    )


def make(example, folder, *flags, monkeypatch):
    size = "--train 64 --dev 8 --test 6 --trained 2 --deepest 4 --cells 12".split()
    monkeypatch.setattr(sys, "argv", ["sheets.py", str(folder), *size, *flags])
    example.sheets.main()
    return {path.name: path.read_text().splitlines() for path in sorted(folder.iterdir())}


def test_files(example, tmp_path, monkeypatch):
    found = make(example, tmp_path / "a", monkeypatch=monkeypatch)
    assert sorted(found) == sorted(
        f"{name}.{kind}"
        for name in ("train", "dev", *(f"depth-{n}" for n in range(1, 5)))
        for kind in ("input0", "label")
    )
    texts = [text for name, lines in found.items() if name.endswith("input0") for text in lines]
    assert len(set(texts)) == len(texts) == 64 + 8 + 4 * 6  # none of a test is in train
    for name in (name.removesuffix(".label") for name in found if name.endswith(".label")):
        values = [look_up(text) for text in found[f"{name}.input0"]]
        assert [str(value) for value, _ in values] == found[f"{name}.label"]
        kind, _, depth = name.partition("-")
        assert {depth for _, depth in values} == ({int(depth)} if kind == "depth" else {1, 2})
    assert make(example, tmp_path / "b", monkeypatch=monkeypatch) == found
    more = make(example, tmp_path / "c", "--train", "32", monkeypatch=monkeypatch)
    assert more["depth-3.input0"] == found["depth-3.input0"]  # the tests do not depend on what is trained on
    assert make(example, tmp_path / "d", "--seed", "2", monkeypatch=monkeypatch)["dev.input0"] != found["dev.input0"]
    with pytest.raises(UsageError, match="--cells 12 leaves no room for such depths: they need 16"):
        make(example, tmp_path / "e", "--deepest", "6", monkeypatch=monkeypatch)
    assert not (tmp_path / "e").exists()
    with pytest.raises(UsageError, match="there are too few sheets of 4 cells"):
        list(example.sheets.sheets("a", 4, [1] * 1000, set()))


@pytest.fixture
def data(example, tmp_path, monkeypatch):
    (tmp_path / "data" / "bin" / "input0").mkdir(parents=True)
    make(example, tmp_path / "data" / "text", monkeypatch=monkeypatch)
    for name in ("test", "test1", "test2"):
        (tmp_path / "data" / "bin" / "input0" / f"{name}.bin").touch()
    return tmp_path / "data"


def study(example, data, *flags):
    words = [str(data), str(data.parent / "out"), "--user-dir", USER_DIR, *flags]
    return example.depth.Study(example.depth.parse(words))


def dictionary(words):
    from fairseq.data import Dictionary

    found = Dictionary()
    for word in words:
        found.add_symbol(word)
    return found


def test_a_row_is_what_fairseq_trains(example, data):
    made = study(example, data, "--width", "8", "--batch-size", "5")
    assert made.updates == 13 and made.subsets == ["test", "test1", "test2"]
    for name in made.names:
        row, (command, *words) = example.depth.ROWS[name], made.train(name, 7)
        assert command == "fairseq-train"
        cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(options.get_training_parser(), words))
        assert (
            cfg.dataset.curriculum == cfg.optimization.max_epoch == 1 and cfg.common.seed == 7 and cfg.task.no_shuffle
        )
        task_class = tasks.TASK_REGISTRY["sentence_prediction"]
        task = task_class(cfg.task, dictionary(map(str, range(30))), dictionary(map(str, range(10))))
        model = task.build_model(cfg.model)
        (stack,) = [each for each in model.modules() if isinstance(each, LayerStack)]
        assert len(stack.schedule) == row.depths and len(set(stack.schedule)) == row.layers
        criterion = task.build_criterion(cfg.criterion)
        if row.flags:
            criterion.check_model(model)
        assert (stack.halting is not None or stack.router is not None) == (name in example.depth.HALTING)
        found = model(
            torch.randint(4, 34, (2, 6)), features_only=True, classification_head_name="sentence_classification_head"
        )
        assert found[0].shape == (2, 10)
    setting = example.depth.Setting(12, 0.9)
    assert made.layers("pondernet", 1, setting)[-6:-1] == ["--depths", "12", "--quantile", "0.9", "--output"]
    assert made.validate("pondernet", 1, setting)[-1] == "{'encoder_layers': 12, 'exit_quantile': 0.9}"
    for name in example.depth.ROWS:
        own, *more = example.depth.settings_of(name)
        assert str(own) == str(example.depth.ROWS[name].depths)
        assert not {"--model-overrides", "--depths"} & {*made.validate(name, 1, own), *made.layers(name, 1, own)}
        assert bool(more) == (name in example.depth.LOOPED)


@pytest.mark.parametrize(
    "flags, match",
    (
        (["--only", "nothing"], "'nothing' is no model of this: there are plain-6"),
        (["--seeds", "1,1"], "different whole numbers"),
        (["--seeds", "0"], "different whole numbers"),
        (["--width", "10"], "no multiple of the 4 heads"),
    ),
)
def test_mistakes_are_refused_first(example, data, flags, match):
    with pytest.raises(UsageError, match=match):
        study(example, data, *flags)


def test_data_and_folders_are_looked_at_first(example, data):
    with pytest.raises(UsageError, match="train.label is missing: make it with examples/depth/prepare.sh"):
        study(example, data / "bin")
    study(example, data).begin()
    study(example, data, "--only", "act").begin()
    with pytest.raises(UsageError, match="was begun with .*64"):
        study(example, data, "--batch-size", "32").begin()


def test_what_a_log_has_said(example, tmp_path):
    log = tmp_path / "at-6.log"
    values = [("test", 50.0), ("test1", 100), ("test10", 12.5)]
    lines = [f'2026-11-30 | INFO | {name} | {{"epoch": "", "{name}_accuracy": "{value}"}}' for name, value in values]
    log.write_text("fairseq-validate DATA\n" + "\n".join(lines) + "\n")
    assert example.depth.said(log, [name for name, _ in values], "accuracy") == [50, 100, 12.5]
    for name, value in (("test2", "accuracy"), ("test", "depth")):
        with pytest.raises(UsageError, match=f"has no {value} of {name}"):
            example.depth.said(log, [name], value)


def test_layers_by_depth(example):
    texts = ["=2 7 =1", "=1 3 =1"]
    said = [SimpleNamespace(updates=[4, 1, 2, 9]), SimpleNamespace(updates=[2, 1, 3, 9])]  # the last is of </s>
    found = example.layers.table(texts, said)
    assert found["asked"] == {1: 2, 2: 4} and found["cells"] == {0: 1, 1: 2.5} and found["all"] == 31 / 8


def results(**changed):
    rows = [
        {"row": name, "seed": seed, "parameters": 10, "multiply_adds": 1e6, "mean_depth": 3.0, "accuracy": accuracy}
        for seed in (1, 2)
        for name, accuracy in (
            ("act", {"6": [50, 100 - seed, 80], "12": [50, 90, 70]}),
            ("plain-3", {"3": [40, 60, 20]}),
        )
    ]
    for row in rows:
        if row["row"] == "act":
            row["layers"] = {"6": {"asked": {"1": 2.0, "2": 2.5}, "cells": {"0": 1, "1": 2, "2": 3}, "all": 1}}
            row["depth"] = {"6": [1.5, 1, 2], "12": [1.5, 2, 4]}
    return {"group": "depth", "runs": rows, **changed}


def test_table_and_means(example, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(results()))
    found = example.plot.read_results(path)
    assert list(found) == ["plain-3", "act"]
    assert example.plot.over_depth(found["act"], "accuracy", "6") == [98.5, 80]
    assert example.plot.over_depth(found["act"], "depth", "12") == [2, 4]
    lines = example.plot.table(found, 1).splitlines()
    assert "| `plain-3` | 3 | 10 | 60.0 ± 0.0 | 20.0 ± 0.0 | 3 |  |  | 2 |" in lines
    assert "| `act` | 6 | 10 | 98.5 ± 0.7 | 80.0 ± 0.0 | 1.00 | 1.00, 1.00 | 2.00, 2.00 | 2 |" in lines
    other, all_of_them = tmp_path / "b.json", results()
    one, two = (
        {**all_of_them, "runs": [row for row in all_of_them["runs"] if row["seed"] % 2 == rest]} for rest in (0, 1)
    )
    path.write_text(json.dumps(one)), other.write_text(json.dumps(two))
    assert example.plot.read_results(path, other) == example.plot.read_results(other, path) == found
    with pytest.raises(UsageError, match="act of seed 1 is in .*b.json and in .*b.json: name one of them"):
        example.plot.read_results(path, other, other)
    path.write_text(json.dumps({"runs": [{"row": "act"}]}))
    with pytest.raises(UsageError, match="was not written by examples/depth"):
        example.plot.read_results(path)


def test_committed_results_are_drawn(example):
    pytest.importorskip("matplotlib")
    found = example.plot.read_results(*FOLDER.glob("results/*.json"))
    figure, panels = example.plot.pyplot().subplots(1, 3)
    example.plot.draw(panels, found, 6)
    assert len(panels[0].lines) >= len(found) and panels[1].lines and panels[2].lines
    example.plot.pyplot().close(figure)


def test_dry_run_prints_what_can_be_run(example, data, monkeypatch, capsys):
    words = [str(data), str(data.parent / "out"), "--only", "universal", "--seeds", "3", "--dry-run"]
    monkeypatch.setattr(sys, "argv", ["depth.py", *words])
    example.depth.main()
    commands = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert [words[0] for words in commands] == ["fairseq-train", *["fairseq-validate"] * 3, "fairseq-adaptive"]
    assert not (data.parent / "out").exists()

"""``scripts/plot_depth.py`` for translation models, and for text that subword-nmt has split."""

import runpy
import sys
from pathlib import Path

import pytest
from families import build_trainer, write_data

from fairseq_adaptive.data.subwords import SubwordNMT, as_in_text
from fairseq_adaptive.errors import UsageError

SCRIPT = Path(__file__).parents[2] / "scripts" / "plot_depth.py"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A translation model in which tokens halt, its data, codes that make its words whole, and a text."""
    folder = write_data(tmp_path_factory.mktemp("depth"))
    trainer, _ = build_trainer("universal_transformer", folder, "--max-update", "5")
    trainer._gathered_optim_state = None
    trainer.save_checkpoint(str(folder / "model.pt"), {"train_iterator": {"epoch": 1, "iterations_in_epoch": 0}})
    tens, ones = ([f"w {ten}" for ten in range(3)], [f"w{ten} {one}</w>" for ten in range(3) for one in range(10)])
    (folder / "codes").write_text("\n".join(["#version: 0.2", *tens, *ones]) + "\n")
    (folder / "lines").write_text("w07 w21\nw00\n")
    return folder


def run(monkeypatch, capsys, place, *flags):
    command = [place / "model.pt", "--input", place / "lines", "--color", "never", *flags]
    monkeypatch.setattr(sys, "argv", ["plot_depth.py", *map(str, command)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    return capsys.readouterr().out.splitlines()


def test_codes_of_subword_nmt(monkeypatch, capsys, place):
    pytest.importorskip("subword_nmt")
    first, second = run(monkeypatch, capsys, place, "--codes", place / "codes")
    assert [token.rpartition("/")[0] for token in first.split()] == ["▁w07", "▁w21", "</s>"]
    assert [token.rpartition("/")[0] for token in second.split()] == ["▁w00", "</s>"]
    assert all(1 <= int(token.rpartition("/")[2]) <= 4 for token in [*first.split(), *second.split()])


def test_text_that_is_split(monkeypatch, capsys, place):
    assert run(monkeypatch, capsys, place, "--tokenized")[0].startswith("▁w07/")
    assert "token type" in " ".join(run(monkeypatch, capsys, place, "--tokenized", "--table"))


def test_says_how_to_split(monkeypatch, capsys, place):
    with pytest.raises(UsageError, match="--spm with its SentencePiece model, --codes .* or --tokenized"):
        run(monkeypatch, capsys, place)
    (place / "wrong").write_text("#version: 0.2\na b c\n")
    with pytest.raises(UsageError, match="holds no codes of subword-nmt: a line is two pieces"):
        run(monkeypatch, capsys, place, "--codes", place / "wrong")
    (place / "other").write_text("#version: 0.2\na b\n")
    with pytest.raises(UsageError, match="does not hold the codes with which its training text was split"):
        run(monkeypatch, capsys, place, "--codes", place / "other")


def test_pieces_are_shown_as_words():
    pytest.importorskip("subword_nmt")
    assert as_in_text(["lu@@", "mp", ".", "a@@"]) == ["▁lu", "mp", "▁.", "▁a"] and as_in_text([]) == []


def test_codes_are_those_of_the_command(place):
    pytest.importorskip("subword_nmt")
    assert SubwordNMT(place / "codes").tokenize(" w07  wx ") == ["w07", "w@@", "x"]

"""What a user can put right ends in one line, and nothing else does."""

import sys

import pytest
from cli.helpers import call
from families import write_data
from fairseq.data import data_utils

from fairseq_adaptive.errors import report_usage_errors


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data")) / "pairs"


def end(error, capsys):
    sys.excepthook(type(error), error, error.__traceback__)
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "command,flags,said",
    (
        ("generate", (), "error: --path required for generation!"),
        ("generate", ("--path", "a.pt", "--sampling", "--nbest", "2"), "error: --sampling requires --nbest"),
        ("generate", ("--path", "a.pt", "--replace-unk"), "error: --replace-unk requires a raw text dataset"),
        ("generate", ("--path", "a.pt"), "error: checkpoint a.pt does not exist"),
        ("validate", ("--task", "translation", "--path", "a.pt"), "error: Must specify batch size"),
        ("validate", ("--task", "translation", "--batch-size", "2"), "error: --path is missing"),
        ("interactive", (), "error: a path is missing: the folder of the data, or --path with a checkpoint"),
        ("eval-lm", ("--task", "translation"), "error: --path is missing"),
    ),
)
def test_flags_that_a_command_checks(command, flags, said, data, capsys):
    with pytest.raises(Exception) as raised:
        call(f"fairseq-{command}", data, "--cpu", *flags)
    written = end(raised.value, capsys)
    assert written.startswith(said) and written.count("\n") == 1


def test_sentence_longer_than_max_tokens(capsys, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    report_usage_errors()  # this program is no command of fairseq
    with pytest.raises(AssertionError) as raised:
        data_utils.batch_by_size(range(3), lambda index: 30, max_tokens=20)
    assert end(raised.value, capsys).startswith("error: Sentences lengths should not exceed max_tokens=20")


def test_other_assertions_keep_their_traceback(capsys):
    with pytest.raises(AssertionError) as raised:
        assert not "here", "an internal check"
    assert "Traceback" in end(raised.value, capsys)

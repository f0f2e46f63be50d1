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


USERS = """
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules import layer_schedule

def handles_a_missing_file(*args):
    try:
        open("no-such-file")
    except FileNotFoundError:
        return {}["key"]

def raises_because_of_a_missing_file(*args):
    try:
        open("no-such-file")
    except FileNotFoundError as error:
        raise KeyError("key") from error

def misses_a_file(*args):
    open("no-such-file")

def says_as_fairseq_does(*args):
    raise Exception("Must specify --max-tokens or so")

def handles_our_error(*args):
    try:
        layer_schedule("cycle", 3, 2)
    except UsageError:
        return {}["key"]

def calls_ours(*args):
    layer_schedule("cycle", 3, 2)

def raises_ours(*args):
    raise UsageError("a message of theirs")

def asks_for_a_dictionary(*args):
    from fairseq.data import Dictionary
    Dictionary.load("no-such-file")
"""


@pytest.fixture
def users():
    """What a user's own code does, in a module of theirs."""
    names = {"__name__": "users_plugin.model", "__package__": "users_plugin"}
    exec(compile(USERS, "users_plugin/model.py", "exec"), names)
    return names


@pytest.mark.parametrize(
    "name",
    (
        "handles_a_missing_file",
        "raises_because_of_a_missing_file",
        "misses_a_file",
        "says_as_fairseq_does",
        "handles_our_error",
    ),
)
def test_errors_of_a_users_code_keep_their_traceback(name, users, monkeypatch, capsys):
    monkeypatch.setattr("fairseq_cli.generate.main", users[name])
    with pytest.raises(Exception) as raised:
        call("fairseq-generate", "data", "--path", "a.pt")
    written = end(raised.value, capsys)
    last = written.rstrip().rpartition("\n")[2]
    assert written.startswith("Traceback") and "users_plugin/model.py" in written
    assert last.startswith(f"{type(raised.value).__name__}: ")


@pytest.mark.parametrize(
    "name,said",
    (
        ("calls_ours", "error: 3 unique layers cannot serve 2 depths"),
        ("raises_ours", "error: a message of theirs"),
        ("asks_for_a_dictionary", "error: there is no dictionary no-such-file"),
    ),
)
def test_ours_are_explained_in_a_users_code_too(name, said, users, monkeypatch, capsys):
    monkeypatch.setattr("fairseq_cli.generate.main", users[name])
    with pytest.raises(Exception) as raised:
        call("fairseq-generate", "data", "--path", "a.pt")
    assert end(raised.value, capsys).startswith(said)


@pytest.mark.parametrize("name", ("calls_ours", "raises_ours", "misses_a_file", "asks_for_a_dictionary"))
def test_other_programs_keep_their_tracebacks(name, users, capsys):
    """A program that imports the package is none of its commands."""
    with pytest.raises(Exception) as raised:
        users[name]()
    assert end(raised.value, capsys).startswith("Traceback")


def test_a_missing_file_of_fairseq_is_named(capsys):
    with pytest.raises(Exception) as raised:
        call("fairseq-train", "no-such-folder", "--task", "language_modeling", "--arch", "transformer_lm", "--cpu")
    written = end(raised.value, capsys)
    assert written.startswith("error: ") and written.count("\n") == 1

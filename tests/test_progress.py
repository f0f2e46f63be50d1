"""Bars are on terminals alone, and results come as they are made."""

import io
import sys

from fairseq_adaptive.progress import progress, say


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_is_on_a_terminal_and_goes_when_it_is_done(monkeypatch):
    for kind, shown in ((Terminal, True), (io.StringIO, False)):
        stream = kind()
        monkeypatch.setattr(sys, "stderr", stream)
        assert list(progress(range(3), "batches")) == [0, 1, 2]
        assert ("batches" in stream.getvalue()) == shown
        assert not shown or stream.getvalue().endswith("\r")  # nothing of it is left
        assert list(progress(iter("ab"), "of no length")) == ["a", "b"]


def test_a_result_is_there_before_the_next_step(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    for number in progress(range(2), "lines"):
        say(f"{number}")
        assert out.getvalue().splitlines()[-1] == str(number)
    assert out.getvalue() == "0\n1\n"

"""What a training prints at its start, and what importing does to the log of a program."""

import logging
import re
import sys
import warnings

import pytest

from cli.helpers import USER_DIR, run
from fairseq_adaptive.compat import noise
from families import write_data


def test_a_training_starts_without_warnings(tmp_path):
    flags = (
        f"--user-dir {USER_DIR} -s src -t tgt --arch shared_transformer --encoder-layers 2 --decoder-layers 2 "
        "--encoder-embed-dim 16 --decoder-embed-dim 16 --encoder-ffn-embed-dim 16 --decoder-ffn-embed-dim 16 "
        "--encoder-attention-heads 2 --decoder-attention-heads 2 --halting act --criterion ponder_loss --bf16 "
        "--optimizer adam --lr 0.001 --max-tokens 500 --max-update 2 --no-save --log-format simple --log-interval 1 "
        "--disable-validation"
    ).split()
    data = write_data(tmp_path / "data") / "pairs"
    done = run("fairseq-train", data, *flags, env={"FAIRSEQ_ADAPTIVE_BF16": "always"})
    said = done.stdout + done.stderr
    assert "bfloat16 autocast" in said and "num_updates=2" in said
    assert not re.findall(r".*(?:Warning|warning|deprecat|Disabling|DEBUG).*", said)
    others = [
        line
        for line in done.stderr.splitlines()
        if not re.match(r"\d{4}-\d\d-\d\d .* \| INFO \| | *\(|\)|Shared|  ", line)
    ]
    assert not others


def test_importing_leaves_the_log_alone(monkeypatch):
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", logging.WARNING)
    with noise.as_it_was():
        logging.basicConfig(level=logging.DEBUG)  # as fairseq does when it is imported
    assert root.handlers == [] and root.level == logging.WARNING
    own = logging.NullHandler()
    root.addHandler(own)
    with noise.as_it_was():
        pass
    assert root.handlers == [own]


@pytest.mark.parametrize("options, shown", (([], False), (["default"], True)))
def test_warnings_of_users_stay(options, shown, monkeypatch):
    monkeypatch.setattr(sys, "warnoptions", options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        noise.silence_warnings()
        warnings.warn("\nThe strict flag in the compose API is deprecated.\nSee https://hydra.cc")
        warnings.warn("mine")
    assert [str(each.message).strip()[:4] for each in caught] == ["The "] * shown + ["mine"]

"""Reads commands with their real parsers, in one process: what argparse makes of them.

Run as a program: a JSON list of commands, each a list of words, from the standard input; to the standard output goes a list of
what is wrong with each of them, null where nothing is.
"""

import argparse
import contextlib
import io
import json
import logging
import os
import runpy
import sys
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]


class Read(Exception):
    """A command's flags were read."""


def read_first(parse):
    def parse_args(self, *args, **kwargs):
        parse(self, *args, **kwargs)
        raise Read

    return parse_args


def as_numbers(words):
    return ["1" if word == "N" else word for word in words]


def fairseq(words):
    from fairseq import options

    made = {
        "fairseq-train": options.get_training_parser,
        "fairseq-generate": options.get_generation_parser,
        "fairseq-interactive": lambda: options.get_generation_parser(interactive=True),
        "fairseq-validate": options.get_validation_parser,
        "fairseq-eval-lm": options.get_eval_lm_parser,
        "fairseq-preprocess": options.get_preprocessing_parser,
    }[words[0]]
    parser = made()
    if words[0] == "fairseq-preprocess":
        parser.parse_args(words[1:])
        return
    options.parse_args_and_arch(parser, words[1:])


def ours(words):
    from fairseq_adaptive import commands

    if len(words) > 1:
        commands.main(words[1:])


def script(words):
    """``python FILE``, or ``python -m MODULE`` of ours."""
    if words[1] == "-m":
        return ours(words[2:]) if words[2] == "fairseq_adaptive" else None
    if Path(words[1]).parts[0] == "tests":
        return None  # it has no flags, and would write the tables that tests compare with
    with (
        mock.patch.object(sys, "argv", words[1:]),
        mock.patch.object(sys, "path", [str(Path(words[1]).parent), *sys.path]),
    ):
        runpy.run_path(words[1], run_name="__main__")


def sacrebleu(words):
    from sacrebleu.sacrebleu import parse_args

    parse_args()


def reader(name):
    if name.startswith("fairseq-") and name != "fairseq-adaptive":
        return fairseq
    return {"fairseq-adaptive": ours, "python": script, "python3": script, "sacrebleu": sacrebleu}[name]


def fault(words):
    """What is wrong with a command, or None."""
    said, words = io.StringIO(), as_numbers(words)
    parsers = mock.patch.object(argparse.ArgumentParser, "parse_args", read_first(argparse.ArgumentParser.parse_args))
    if reader(words[0]) is fairseq:  # its parsers are asked several times
        parsers = contextlib.nullcontext()
    with (
        mock.patch.object(sys, "argv", list(words)),
        contextlib.redirect_stderr(said),
        contextlib.redirect_stdout(said),
        parsers,
    ):
        try:
            reader(words[0])(words)
        except Read:
            return None
        except SystemExit as end:
            return None if not end.code else f"{end.code} {said.getvalue()[-400:]}"
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return None


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    os.chdir(ROOT)
    told = [fault(words) for words in json.load(sys.stdin)]
    json.dump(told, sys.stdout)

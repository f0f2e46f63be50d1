"""What every command-line test needs: a tiny learnable corpus, and stock fairseq commands run as a user runs them.

Import it as ``from cli.helpers import run, tiny_translation_data, USER_DIR`` from any test.
"""

import contextlib
import importlib
import io
import os
import random
import subprocess
import sys
from pathlib import Path
from unittest import mock

import fairseq_adaptive

from cli import commands

USER_DIR = str(Path(fairseq_adaptive.__file__).parent)
TINY_TRANSFORMER = [
    "--encoder-embed-dim",
    "16",
    "--encoder-ffn-embed-dim",
    "32",
    "--encoder-attention-heads",
    "2",
    "--encoder-layers",
    "1",
    "--decoder-embed-dim",
    "16",
    "--decoder-ffn-embed-dim",
    "32",
    "--decoder-attention-heads",
    "2",
    "--decoder-layers",
    "1",
    "--share-all-embeddings",
]


def run(command, *args, check=True, env=None, timeout=300, **kwargs):
    """Runs ``command`` (``fairseq-train``, ``torchrun``, ...) from this interpreter's folder, in its own process, which
    for commands in Python is forked from one that has imported fairseq (:mod:`cli.commands`).

    The process sees no CUDA device and one thread, so that results and times do not depend on the machine; ``env`` adds
    to its environment. Returns a ``subprocess.CompletedProcess`` with text ``stdout`` and ``stderr``. With ``check``,
    raises an ``AssertionError`` that shows both where the exit status is not 0.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")  # each has a port for torchrun
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PET_MASTER_PORT": str(29500 + int(worker)),
        **(env or {}),
    }
    argv = [str(Path(sys.executable).parent / command), *map(str, args)]
    if not any(map(commands.is_read_at_start, env or ())):
        environment.update(commands.stubs(environment))
        if command in commands.NAMES and "preexec_fn" not in kwargs:  # which would be the stub's
            argv[0] = str(Path(commands.stub_folder(), command))
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=timeout, **kwargs)
    if check:
        assert done.returncode == 0, f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def call(command, *args):
    """Runs a fairseq command as :func:`run` does, but within this process, and returns what it wrote to stdout.

    An error stays the exception that it is. Logging does not go to what is returned: ask pytest's ``caplog``.
    """
    module = importlib.import_module(f"fairseq_cli.{command.removeprefix('fairseq-').replace('-', '_')}")
    written = io.StringIO()
    with mock.patch.object(sys, "argv", [command, *map(str, args)]), contextlib.redirect_stdout(written):
        module.cli_main()
    return written.getvalue()


def tiny_translation_data(folder, n_train=200, n_valid=20, n_test=20, n_words=50, min_length=2, max_length=8, seed=1):
    """Writes a parallel corpus that a tiny model can learn and binarises it; returns the folder for ``fairseq-train``.

    Sentences are of ``min_length`` to ``max_length`` words out of ``n_words``; each word has one translation and the
    target is in reverse order. Languages are ``src`` and ``tgt`` with a joined dictionary. The text lies in
    ``folder/{train,valid,test}.{src,tgt}``, the binarised data in ``folder/bin``.
    """
    folder, rng = Path(folder), random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for split, size in ("train", n_train), ("valid", n_valid), ("test", n_test):
        sentences = [[rng.randrange(n_words) for _ in range(rng.randint(min_length, max_length))] for _ in range(size)]
        for lang, order in ("src", 1), ("tgt", -1):
            lines = (" ".join(f"{lang}{word:02d}" for word in words[::order]) + "\n" for words in sentences)
            (folder / f"{split}.{lang}").write_text("".join(lines))
    run(
        "fairseq-preprocess",
        "--source-lang",
        "src",
        "--target-lang",
        "tgt",
        "--joined-dictionary",
        "--trainpref",
        folder / "train",
        "--validpref",
        folder / "valid",
        "--testpref",
        folder / "test",
        "--destdir",
        folder / "bin",
        cwd=folder,
    )
    return folder / "bin"

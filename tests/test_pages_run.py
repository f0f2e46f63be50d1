"""Commands of pages that run, as they stand there but small: widths, batches and updates are cut down (``cli/shrunk.py``), and
what stands for data of one's own is tiny data, made here."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from cli import commands
from cli.helpers import run, tiny_translation_data
from pages import ROOT, plain, shell_blocks

TRAIN = "fairseq-train data-bin --user-dir fairseq_adaptive --arch shared_transformer --save-dir checkpoints"
# page, how each of its blocks begins that run in turn in one folder, and what runs before them
RUN = (
    ("README.md", ["pip install -c"], ""),
    ("README.md", ["fairseq-train data-bin/wikitext"], ""),
    ("docs/add-a-mechanism.md", ["fairseq-train"], ""),
    (
        "docs/checkpoints.md",
        ["python scripts/average", "python scripts/export_checkpoint.py averaged.pt --to fairseq"],
        TRAIN + "\nfor n in {1..10}; do cp checkpoints/checkpoint_last.pt checkpoints/checkpoint$n.pt; done",
    ),
)
FAST = "README.md"
WRAPPER = '#!/bin/bash\nexec python "$PAGE_ROOT/tests/cli/shrunk.py" "${0##*/}" "$@"\n'


def begins(block, starts):
    return block.lstrip().startswith(tuple(starts))


def preprocess(out, *flags):
    run("fairseq-preprocess", "--only-source", "--destdir", out, *flags)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with tiny data for each task."""
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(1)
    bin_of = tiny_translation_data(folder / "text", n_train=30, n_valid=6, n_test=6, n_words=30)
    (folder / "translation").symlink_to(bin_of)
    for split, count in (("train", 12), ("valid", 4), ("test", 4)):
        sentences = [" ".join(rng.choices([f"w{number}" for number in range(40)], k=12)) for _ in range(count)]
        (folder / f"{split}.txt").write_text("\n".join(sentences) + "\n")
    splits = ("train", "valid", "test")
    text = [word for name in splits for word in (f"--{name}pref", folder / f"{name}.txt")]
    preprocess(folder / "language_modeling", *text)
    return folder


@pytest.mark.parametrize(
    "page, starts, before",
    [
        pytest.param(*each, id=f"{each[0]}-{number}", marks=[pytest.mark.slow] * (each[0] != FAST))
        for number, each in enumerate(RUN)
    ],
)
def test_commands_run(page, starts, before, data, tmp_path):
    for name in ("examples", "scripts", "fairseq_adaptive"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / ".bin").mkdir()
    for name in ("train", "generate", "validate", "eval-lm"):
        (tmp_path / ".bin" / f"fairseq-{name}").write_text(WRAPPER)
        (tmp_path / ".bin" / f"fairseq-{name}").chmod(0o755)
    (tmp_path / ".bin" / "pip").write_text("#!/bin/sh\n")
    (tmp_path / ".bin" / "pip").chmod(0o755)
    blocks = [block for _, within, block in shell_blocks(ROOT / page) if not within and begins(block, starts)]
    assert len(blocks) >= len(starts)
    script = "\n".join(["set -euo pipefail", before, *(plain(block, {}) for block in blocks)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.update(commands.stubs(environment))
    folders = (str(tmp_path / ".bin"), commands.stub_folder(), str(Path(sys.executable).parent), os.environ["PATH"])
    environment |= {"PATH": os.pathsep.join(folders), "PAGE_DATA": str(data), "PAGE_ROOT": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{script}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"

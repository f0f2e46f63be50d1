"""The shared language model through the stock commands, with adaptive input and softmax."""

import re

import pytest
from cli.helpers import USER_DIR, run

LM = (
    "--task language_modeling --user-dir {} --decoder-layers 4 --decoder-unique-layers 2 --decoder-embed-dim 32 "
    "--decoder-input-dim 32 --decoder-output-dim 32 --decoder-ffn-embed-dim 64 --decoder-attention-heads 2 "
    "--optimizer adam --lr 5e-3 --tokens-per-sample 32 --max-tokens 512 --max-update 40 --cpu --num-workers 0 --seed 1 "
    "--log-format simple --dropout 0.1"
).format(USER_DIR)
PLAIN = "--arch shared_transformer_lm_base --criterion cross_entropy"
ADAPTIVE = (
    "--arch shared_transformer_lm_wikitext103 --adaptive-input-cutoff 10,20 --adaptive-softmax-cutoff 10,20 "
    "--criterion adaptive_loss --ddp-backend legacy_ddp"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A text in which every word is followed by the next one of the alphabet."""
    folder = tmp_path_factory.mktemp("text")
    letters = "abcdefghijklmnopqrstuvwxyz"
    for split, first in (("train", 0), ("valid", 3), ("test", 5)):
        lines = (" ".join(letters[(first + row + i) % 26] for i in range(20)) for row in range(100))
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n")
    prefixes = [flag for split in ("train", "valid", "test") for flag in (f"--{split}pref", folder / f"{split}.txt")]
    run("fairseq-preprocess", "--only-source", *prefixes, "--destdir", folder / "bin")
    return folder / "bin"


@pytest.mark.parametrize("model", (PLAIN, ADAPTIVE), ids=("plain", "adaptive"))
def test_trains_and_evaluates(data, tmp_path, model):
    log = run("fairseq-train", data, *LM.split(), *model.split(), "--save-dir", tmp_path)
    log = log.stderr + log.stdout
    valid = float(re.findall(r"valid on 'valid' subset \| loss ([\d.]+)", log)[-1])
    first = float(re.search(r"epoch 001 \| loss ([\d.]+)", log)[1])
    assert valid < 0.5 * first
    flags = f"--user-dir {USER_DIR} --gen-subset valid --tokens-per-sample 32 --max-tokens 512 --cpu --num-workers 0"
    done = run("fairseq-eval-lm", data, *flags.split(), "--path", tmp_path / "checkpoint_last.pt")
    loss = float(re.search(r"Loss \(base 2\): ([\d.]+), Perplexity", done.stderr + done.stdout)[1])
    if model is PLAIN:
        assert loss == pytest.approx(valid, abs=2e-3)
    else:
        # fairseq's adaptive_loss takes the second word of every tail for padding and leaves it out; eval-lm does not
        assert valid < loss < 0.6 * first

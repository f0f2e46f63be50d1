"""fairseq's own language model with its adaptive softmax, trained by our criterion and scored by fairseq-eval-lm."""

import math
import random
import re

import pytest
from cli.helpers import USER_DIR, run

TRAIN = (
    "--task language_modeling --user-dir {} --arch transformer_lm --decoder-layers 1 --decoder-embed-dim 16 "
    "--decoder-ffn-embed-dim 32 --decoder-attention-heads 2 --criterion adaptive_cross_entropy --label-smoothing 0.1 "
    "--optimizer adam --lr 1e-2 --tokens-per-sample 32 --max-tokens 512 --max-epoch 1 --cpu --num-workers 0 --seed 1 "
    "--log-format simple --no-epoch-checkpoints"
).format(USER_DIR)


def test_trains_and_evaluates_alike(tmp_path):
    rng = random.Random(1)
    for split, lines in (("train", 400), ("valid", 100)):
        text = (" ".join(f"w{int(40 * rng.random() ** 2):02d}" for _ in range(12)) for _ in range(lines))
        (tmp_path / f"{split}.txt").write_text("\n".join(text) + "\n")
    run(
        "fairseq-preprocess",
        "--only-source",
        "--trainpref",
        tmp_path / "train.txt",
        "--validpref",
        tmp_path / "valid.txt",
        "--destdir",
        tmp_path / "bin",
    )
    done = run(
        "fairseq-train",
        tmp_path / "bin",
        *TRAIN.split(),
        "--adaptive-softmax-cutoff",
        "10,20",
        "--adaptive-softmax-factor",
        "2",
        "--save-dir",
        tmp_path,
    )
    log = done.stderr + done.stdout
    loss, nll, perplexity = map(
        float, re.search(r"valid on 'valid' subset \| loss ([\d.]+) \| nll_loss ([\d.]+) \| ppl ([\d.]+)", log).groups()
    )
    assert perplexity == pytest.approx(2**nll, rel=2e-3)
    assert nll < loss and nll < math.log2(40)  # it has learnt that some of the 40 words are rare
    flags = f"--user-dir {USER_DIR} --gen-subset valid --tokens-per-sample 32 --max-tokens 512 --cpu --num-workers 0"
    done = run("fairseq-eval-lm", tmp_path / "bin", *flags.split(), "--path", tmp_path / "checkpoint_last.pt")
    scored = float(re.search(r"Loss \(base 2\): ([\d.]+), Perplexity", done.stderr + done.stdout)[1])
    assert scored == pytest.approx(nll, abs=2e-3)

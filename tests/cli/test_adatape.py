"""The tape through the stock commands: parity that is generated, and the ImageNet script on a folder of its format."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from cli.helpers import USER_DIR, run
from cli.wmt14 import bash

EXAMPLES = Path(__file__).parents[2] / "examples" / "adatape"
PARITY = (
    f"--user-dir {USER_DIR} --task parity --sequence-length 8 --train-examples 640 --eval-examples 256 "
    "--arch adatape_parity --encoder-embed-dim 32 --encoder-ffn-embed-dim 32 --encoder-attention-heads 2 "
    "--tape-mlp-dim 32 --tape-ffn-embed-dim 32 --tape-tokens 4 --tape-threshold 2 --dropout 0.1 "
    "--criterion tape_ponder_loss --optimizer adam --lr 3e-3 --batch-size 64 --seed 1 --cpu --num-workers 0 "
    "--log-format simple --no-epoch-checkpoints"
).split()


def test_parity_trains_and_resumes_exactly(tmp_path):
    save = ("--save-interval-updates", "7", "--save-dir", tmp_path / "through")
    log = run("fairseq-train", *PARITY, "--max-update", "24", *save)
    log = log.stderr + log.stdout
    pattern = r"valid on 'valid' subset \| loss ([\d.]+) .*\| tape_len ([\d.]+) \| .*\| tape_lens \S+:[\d.]+"
    valid = re.findall(pattern, log)
    assert float(valid[-1][0]) < float(valid[0][0]) and 2 <= float(valid[-1][1]) <= 4
    middle = tmp_path / "through" / "checkpoint_1_7.pt"  # of an epoch of 10 updates
    run("fairseq-train", *PARITY, "--max-update", "24", "--restore-file", middle, "--save-dir", tmp_path / "resumed")
    through, resumed = (torch.load(tmp_path / name / "checkpoint_last.pt", weights_only=False)["model"]
                        for name in ("through", "resumed"))
    for name, tensor in through.items():
        assert torch.equal(tensor, resumed[name]), name


def test_imagenet_script_on_a_small_folder(tmp_path):
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(1)
    for split, count in ("train", 6), ("valid", 2):
        for number, name in enumerate(("n01440764", "n01443537")):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for each in range(count):
                noise = rng.integers(0, 100, (40, 48, 3)) + (0, 150 * number, 0)
                image.fromarray(noise.astype(np.uint8)).save(folder / f"{name}_{each}.JPEG")
    small = ("--image-size 32 --patch-size 8 --tape-bank-patch-size 4 --encoder-layers 2 --encoder-embed-dim 24 "
             "--encoder-attention-heads 2 --encoder-ffn-embed-dim 24 --tape-mlp-dim 24 --batch-size 4 --update-freq 1 "
             "--max-epoch 2 --cpu --num-workers 0 --log-format simple").split()
    log = bash(EXAMPLES / "train-imagenet.sh", tmp_path / "data", tmp_path / "out", "adatape_vit_s16", *small)
    log = log.stderr + log.stdout
    assert len(re.findall(r"valid on 'valid' subset \| .* accuracy", log)) == 2 and "tape_len" in log
    tape_map = tmp_path / "map.png"
    plot = ("--path", tmp_path / "out" / "checkpoint_last.pt", "--gen-subset", "valid", "--output", tape_map)
    told = run("python", EXAMPLES.parents[1] / "scripts" / "plot_tape.py", tmp_path / "data", *plot).stdout
    assert re.search(r"images 4, accuracy [\d.]+, tape [\d.]+", told) and tape_map.stat().st_size > 1000

    broken = tmp_path / "data" / "train" / "n01440764" / "n01440764_3.JPEG"
    broken.write_bytes(broken.read_bytes()[:200])
    done = bash(EXAMPLES / "train-imagenet.sh", tmp_path / "data", tmp_path / "other", "adatape_vit_s16", *small,
                "--num-workers", "1", check=False)
    assert done.returncode != 0 and "Traceback" not in done.stderr.partition("error: ")[2]
    assert re.search(r"^error: \S+/n01440764_3.JPEG cannot be read as an image .*remove or replace it$", done.stderr, re.M)

"""The tape through the stock commands: generated parity, sentences, the ImageNet script on a folder of its format."""

import json
import random
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
    through, resumed = (
        torch.load(tmp_path / name / "checkpoint_last.pt", weights_only=False)["model"]
        for name in ("through", "resumed")
    )
    for name, tensor in through.items():
        assert torch.equal(tensor, resumed[name]), name


def test_bfloat16_tracks_single_precision(tmp_path):
    flags = *PARITY, "--max-update", "24", "--log-interval", "4", "--log-format", "json", "--dropout", "0", "--no-save"
    losses = {}
    for more in (), ("--bf16",):
        done = run("fairseq-train", *flags, *more)
        losses[more] = [
            float(json.loads(line[line.index("{") :])["loss"])
            for line in done.stdout.splitlines()
            if '"num_updates"' in line and '"loss"' in line
        ]
    exact, half = (np.array(each) for each in losses.values())
    assert len(exact) == len(half) >= 4 and (exact != half).any()  # computed in another precision
    np.testing.assert_allclose(half, exact, rtol=0.05)  # where a near tie falls otherwise, other entries are read


def test_sentences_that_halt_under_the_stock_task(tmp_path):
    rng = random.Random(1)
    for split, size in ("train", 160), ("valid", 48):
        labels = [rng.choice(("good", "bad")) for _ in range(size)]
        lines = (" ".join(f"w{rng.randrange(20)}" for _ in range(rng.randint(2, 9))) + f" {label}" for label in labels)
        (tmp_path / f"{split}.input0").write_text("\n".join(lines) + "\n")
        (tmp_path / f"{split}.label").write_text("\n".join(labels) + "\n")
    for part in "input0", "label":
        prefixes = [flag for split in ("train", "valid") for flag in (f"--{split}pref", tmp_path / f"{split}.{part}")]
        run("fairseq-preprocess", "--only-source", *prefixes, "--destdir", tmp_path / "bin" / part)
    flags = (
        f"--user-dir {USER_DIR} --task sentence_prediction --num-classes 2 --max-positions 32 --init-token 0 "
        "--cpu --num-workers 0 --criterion ponder_loss --task-criterion tape_ponder_loss"
    ).split()
    model = "--arch adatape_tiny --halting act --encoder-unique-layers 1 --encoder-layers 3".split()
    train = "--optimizer adam --lr 1e-3 --batch-size 32 --max-update 25 --seed 1 --log-format simple".split()
    log = run("fairseq-train", tmp_path / "bin", *flags, *model, *train, "--save-dir", tmp_path / "save")
    valid = re.findall(r"valid on 'valid' subset .*", log.stdout + log.stderr)
    for name in "accuracy", "tape_len ", "tape_lens", "bank_used", "ponder_cost", "ponder_loss", "depth ", "depth_3":
        assert f"| {name}" in valid[-1], name
    first, last = (float(re.search(r"\| task_loss ([\d.]+)", line)[1]) for line in (valid[0], valid[-1]))
    assert last < first
    done = run(
        "fairseq-validate",
        tmp_path / "bin",
        *flags,
        "--path",
        tmp_path / "save" / "checkpoint_last.pt",
        "--batch-size",
        "7",
    )
    told = valid[-1], done.stdout + done.stderr
    for name in "accuracy", "tape_len", "depth":  # also in batches of another size
        expected, found = (re.findall(rf"\| {name} ([\d.]+)", each)[-1] for each in told)
        assert float(found) == pytest.approx(float(expected), abs=2e-3), name


def test_refuses_in_one_line(tmp_path):
    flags = "--router", "mixture_of_depths", "--skimming", "--save-dir", tmp_path / "save"
    done = run("fairseq-train", *PARITY, *flags, check=False)
    assert done.returncode != 0 and "Traceback" not in done.stderr and not list((tmp_path / "save").iterdir())
    assert re.search(
        "^error: --skimming and --router mixture_of_depths contradict each other: leave one of them out$",
        done.stderr,
        re.M,
    )


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
    small = (
        "--image-size 32 --patch-size 8 --tape-bank-patch-size 4 --encoder-layers 2 --encoder-embed-dim 24 "
        "--encoder-attention-heads 2 --encoder-ffn-embed-dim 24 --tape-mlp-dim 24 --batch-size 4 --update-freq 1 "
        "--max-epoch 2 --cpu --num-workers 0 --log-format simple"
    ).split()
    log = bash(EXAMPLES / "train-imagenet.sh", tmp_path / "data", tmp_path / "out", "adatape_vit_s16", *small)
    log = log.stderr + log.stdout
    assert len(re.findall(r"valid on 'valid' subset \| .* accuracy", log)) == 2 and "tape_len" in log
    tape_map = tmp_path / "map.png"
    plot = ("--path", tmp_path / "out" / "checkpoint_last.pt", "--gen-subset", "valid", "--output", tape_map)
    told = run("python", EXAMPLES.parents[1] / "scripts" / "plot_tape.py", tmp_path / "data", *plot).stdout
    assert re.search(r"images 4, accuracy [\d.]+, tape [\d.]+", told) and tape_map.stat().st_size > 1000

    broken = tmp_path / "data" / "train" / "n01440764" / "n01440764_3.JPEG"
    broken.write_bytes(broken.read_bytes()[:200])
    done = bash(
        EXAMPLES / "train-imagenet.sh",
        tmp_path / "data",
        tmp_path / "other",
        "adatape_vit_s16",
        *small,
        "--num-workers",
        "1",
        check=False,
    )
    assert done.returncode != 0 and "Traceback" not in done.stderr.partition("error: ")[2]
    assert re.search(
        r"^error: \S+/n01440764_3.JPEG cannot be read as an image .*remove or replace it$", done.stderr, re.M
    )

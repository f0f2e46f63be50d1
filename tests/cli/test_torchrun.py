"""torchrun on a CPU: several workers train one model, as one worker with so many batches per update does."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cli.helpers import TINY_TRANSFORMER, USER_DIR, run, tiny_translation_data
from families import FAMILIES

# loaded by every Python process of torchrun: notes which worker renames a checkpoint into place
NOTE_RENAMES = """
import os, sys
def note(event, args):
    if event == "os.rename" and str(args[1]).endswith(".pt"):
        with open(os.environ["RENAMES"], "a") as f:
            f.write(os.environ.get("RANK", "none") + "\\n")
sys.addaudithook(note)
"""


def flags(data, save_dir, epochs, *more):
    # without dropout nothing random depends on the number of workers
    return [
        data,
        "--user-dir",
        USER_DIR,
        "--arch",
        "transformer",
        *TINY_TRANSFORMER,
        "--dropout",
        "0",
        "--optimizer",
        "adam",
        "--lr",
        "0.005",
        "--batch-size",
        "8",
        "--max-epoch",
        epochs,
        "--save-dir",
        save_dir,
        "--cpu",
        "--num-workers",
        "0",
        "--log-format",
        "json",
        *more,
    ]


def torchrun(command, *args, workers=2, **kwargs):
    return run("torchrun", "--nproc-per-node", workers, Path(sys.executable).parent / command, *args, **kwargs)


def logged(done, tag):
    """Every JSON record that the command logged as ``tag`` (``train``, ``valid``)."""
    lines = [line for line in (done.stdout + done.stderr).splitlines() if f"| INFO | {tag} | {{" in line]
    return [json.loads(line.split(" | ")[-1]) for line in lines]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two epochs: by one worker with --update-freq 2; and by two workers, stopped after the first epoch and resumed."""
    folder = tmp_path_factory.mktemp("torchrun")
    data = tiny_translation_data(folder / "data", n_train=96, n_valid=17)
    (folder / "sitecustomize.py").write_text(NOTE_RENAMES)
    env = {"PYTHONPATH": f"{folder}:{Path(USER_DIR).parent}", "RENAMES": str(folder / "renames")}
    one = run("fairseq-train", *flags(data, folder / "one", 2, "--update-freq", "2"))
    first = torchrun("fairseq-train", *flags(data, folder / "two", 1), env=env)
    second = torchrun("fairseq-train", *flags(data, folder / "two", 2))
    return folder, logged(one, "train"), logged(first, "train") + logged(second, "train"), logged(one, "valid")


def test_two_workers_train_one_model(trained):
    folder, one, two, _ = trained
    assert [record["train_num_updates"] for record in two] == ["6", "12"]
    for name in "train_loss", "train_wpb", "train_bsz", "train_num_updates", "train_gnorm":
        assert [record[name] for record in two] == [record[name] for record in one]
    models = [torch.load(folder / name / "checkpoint_last.pt", weights_only=True)["model"] for name in ("one", "two")]
    for name, weight in models[0].items():
        torch.testing.assert_close(models[1][name], weight, rtol=1e-4, atol=1e-5, msg=name)


def test_only_worker_0_saves(trained):
    # checkpoint1.pt, checkpoint_best.pt and checkpoint_last.pt
    assert (trained[0] / "renames").read_text().split() == ["0", "0", "0"]


def test_two_workers_validate(trained):
    folder, _, _, valid = trained
    done = torchrun(
        "fairseq-validate",
        folder / "data" / "bin",
        "--user-dir",
        USER_DIR,
        "--task",
        "translation",
        "--path",
        folder / "two" / "checkpoint_last.pt",
        "--batch-size",
        "8",
        "--cpu",
        "--log-format",
        "json",
    )
    assert {record["valid_loss"] for record in logged(done, "valid")} == {valid[-1]["valid_loss"]}


@pytest.mark.slow
def test_differences_of_depths(tmp_path):
    """Those of all depths are one parameter: each worker has a gradient of it, whatever depths LayerDrop leaves out."""
    data = tiny_translation_data(tmp_path / "data", n_train=96, n_valid=17)
    lora = (
        "--arch",
        "shared_transformer",
        "--encoder-layers",
        "4",
        "--encoder-unique-layers",
        "2",
        "--depth-lora-rank",
        "3",
    )
    one = run("fairseq-train", *flags(data, tmp_path / "one", 2, "--update-freq", "2", *lora))
    first = torchrun("fairseq-train", *flags(data, tmp_path / "two", 1, *lora))
    second = torchrun("fairseq-train", *flags(data, tmp_path / "two", 2, *lora))
    assert [each["train_loss"] for each in logged(first, "train") + logged(second, "train")] == [
        each["train_loss"] for each in logged(one, "train")
    ]
    models = [torch.load(tmp_path / name / "checkpoint_last.pt", weights_only=True)["model"] for name in ("one", "two")]
    assert any(name.endswith("fc1.depth_b") for name in models[0])
    for name, weight in models[0].items():
        torch.testing.assert_close(models[1][name], weight, rtol=1e-4, atol=1e-5, msg=name)
    dropped = torchrun("fairseq-train", *flags(data, tmp_path / "dropped", 1, *lora, "--encoder-layerdrop", "0.2"))
    assert len(logged(dropped, "train")) == 1


@pytest.mark.slow
@pytest.mark.parametrize("workers", (2, 4))  # in the last update one or three have none
def test_batches_that_the_workers_do_not_divide(workers, tmp_path):
    """5 batches, the last one of 3 samples."""
    folder = write_images(tmp_path / "images", 35)
    flags = [
        *FAMILIES["adatape_vit"].flags.split(),
        "--batch-size",
        "8",
        "--required-batch-size-multiple",
        "1",
        "--user-dir",
        USER_DIR,
        "--dropout",
        "0",
        "--attention-dropout",
        "0",
        "--optimizer",
        "adam",
        "--lr",
        "0.003",
        "--max-epoch",
        "1",
        "--cpu",
        "--num-workers",
        "0",
        "--log-format",
        "json",
        "--no-epoch-checkpoints",
    ]
    one = run("fairseq-train", folder, *flags, "--update-freq", workers, "--save-dir", tmp_path / "one")
    several = torchrun("fairseq-train", folder, *flags, "--save-dir", tmp_path / "several", workers=workers)
    for tag, names in ("train", ("loss", "bsz", "num_updates", "gnorm")), ("valid", ("loss",)):
        figures = [
            [record[f"{tag}_{name}"] for record in logged(done, tag) for name in names] for done in (one, several)
        ]
        assert figures[0] == figures[1] and figures[0]
    valid = torchrun(
        "fairseq-validate",
        folder,
        "--user-dir",
        USER_DIR,
        "--task",
        "image_classification",
        "--path",
        tmp_path / "several" / "checkpoint_last.pt",
        "--batch-size",
        "8",
        "--cpu",
        "--log-format",
        "json",
        "--required-batch-size-multiple",
        "1",
        workers=workers,
    )
    assert {record["valid_loss"] for record in logged(valid, "valid")} == {logged(one, "valid")[0]["valid_loss"]}


def write_images(folder, count):
    folder.mkdir()
    generator = np.random.default_rng(1)
    for split in "train", "valid":
        np.savez(
            folder / f"{split}.npz",
            images=generator.integers(0, 200, (count, 8, 8)).astype(np.uint8),
            labels=np.arange(count) % 4,
        )
    return folder

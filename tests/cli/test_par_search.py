"""A search, the layout it finds, the training of that layout, perplexity and generation, with the commands."""

import re
from pathlib import Path

import pytest
import torch
from cli.helpers import USER_DIR, run

SCRIPTS = Path(USER_DIR).parent / "scripts"
WIDTHS = [
    "--decoder-embed-dim",
    16,
    "--decoder-ffn-embed-dim",
    32,
    "--decoder-attention-heads",
    2,
    "--memory-length",
    16,
    "--dropout",
    0,
    "--share-decoder-input-output-embed",
    "--decoder-normalize-before",
    "--adaptive-softmax-cutoff",
    "8,16",
]
TASK = ["--user-dir", USER_DIR, "--task", "segmented_language_modeling", "--tokens-per-sample", 16]
TRAIN = [
    *TASK,
    *WIDTHS,
    "--batch-size",
    8,
    "--lr",
    0.01,
    "--clip-norm",
    1,
    "--cpu",
    "--num-workers",
    0,
    "--seed",
    1,
    "--no-epoch-checkpoints",
    "--log-format",
    "simple",
    "--log-interval",
    10,
]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Words that follow each other in a fixed order, five to a line: the next word is certain."""
    folder = tmp_path_factory.mktemp("text")
    words = [f"w{number:02d}" for number in range(20)]
    for split, lines in ("train", 800), ("valid", 40), ("test", 40):
        (folder / split).write_text(
            "".join(" ".join(words[(5 * line + place) % 20] for place in range(5)) + "\n" for line in range(lines))
        )
    run(
        "fairseq-preprocess",
        "--only-source",
        "--trainpref",
        folder / "train",
        "--validpref",
        folder / "valid",
        "--testpref",
        folder / "test",
        "--destdir",
        folder / "bin",
        "--workers",
        1,
    )
    return folder / "bin"


def test_from_search_to_text(text, tmp_path):
    searched = run(
        "fairseq-train",
        text,
        *TRAIN,
        "--arch",
        "par_supernet",
        "--blocks",
        3,
        "--sample-paths",
        "--optimizer",
        "architecture_adam",
        "--architecture-lr",
        0.1,
        "--max-update",
        20,
        "--criterion",
        "architecture_entropy_loss",
        "--entropy-weight",
        1,
        "--target-compute",
        0.5,
        "--disable-validation",
        "--save-dir",
        tmp_path / "search",
    )
    (tmp_path / "log").write_text(searched.stdout + searched.stderr)
    derived = run(
        "python",
        SCRIPTS / "derive_architecture.py",
        tmp_path / "search" / "checkpoint_last.pt",
        "--batch-size",
        2,
        "--tokens-per-sample",
        8,
    )
    layout = re.fullmatch(r"--layout ([af*,0-9]+)", derived.stdout.splitlines()[-1])[1]
    assert re.search(r"\d+\.\d\d of the Transformer-XL's", derived.stdout)
    assert "num_updates=20" in (tmp_path / "log").read_text() and "block_2_i=" in (tmp_path / "log").read_text()

    run(
        "fairseq-train",
        text,
        *TRAIN,
        "--arch",
        "par_transformer_xl",
        "--layout",
        f"a,{layout}",
        "--optimizer",
        "adam",
        "--criterion",
        "adaptive_cross_entropy",
        "--max-update",
        70,
        "--save-dir",
        tmp_path / "found",
        "--disable-validation",
    )
    path = tmp_path / "found" / "checkpoint_last.pt"
    evaluated = run("fairseq-eval-lm", text, *TASK, "--path", path, "--batch-size", 2, "--cpu", "--gen-subset", "test")
    perplexity = float(re.search(r"Perplexity: ([0-9.]+)", evaluated.stdout + evaluated.stderr)[1])
    assert 1 <= perplexity < 3  # of 21 words; a model that reads no context has 12

    asked = run(
        "fairseq-interactive",
        text,
        "--user-dir",
        USER_DIR,
        "--task",
        "language_modeling",
        "--path",
        path,
        "--cpu",
        "--beam",
        2,
        "--max-len-b",
        12,
        input="w05 w06 w07\n",
    )
    hypothesis = next(line for line in asked.stdout.splitlines() if line.startswith("H-")).split("\t")[2]
    assert hypothesis == "w05 w06 w07 w08 w09"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--arch", "par_transformer_xl", "--layout", "afxf"], "malformed at character 3"),
        (["--arch", "par_transformer_xl", "--adaptive-softmax-cutoff", "16,8"], "increasing numbers from 1 to"),
    ],
)
def test_bad_input_is_one_line(text, tmp_path, flags, message):
    done = run(
        "fairseq-train",
        text,
        *TRAIN,
        *flags,
        "--optimizer",
        "adam",
        "--max-update",
        1,
        "--save-dir",
        tmp_path / "none",
        check=False,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert message in [line for line in done.stderr.splitlines() if line.startswith("error: ")][0]
    assert not list((tmp_path / "none").glob("*"))  # fairseq makes the folder first


@pytest.mark.parametrize(
    ("config", "cutoffs"),
    [("text_par_supernet", "8,16"), pytest.param("wikitext103_par_transformer_xl", "8,16", marks=pytest.mark.slow)],
)
def test_hydra_config(text, tmp_path, config, cutoffs):
    root = SCRIPTS.parent
    tiny = ["embed_dim=16", "ffn_embed_dim=32", "attention_heads=2"]
    run(
        "fairseq-hydra-train",
        "--config-dir",
        root / "examples/language_model/config",
        "--config-name",
        config,
        f"task.data={text}",
        f"checkpoint.save_dir={tmp_path / 'ck'}",
        f"hydra.run.dir={tmp_path / 'run'}",
        *(f"++model.decoder_{flag}" for flag in tiny),
        f"model.adaptive_softmax_cutoff='{cutoffs}'",
        "common.cpu=true",
        "++common.fp16=false",
        "++distributed_training.distributed_world_size=1",
        "optimization.max_update=2",
        "dataset.batch_size=2",
        "task.tokens_per_sample=16",
        cwd=root,
    )
    checkpoint = torch.load(tmp_path / "ck" / "checkpoint_last.pt", weights_only=True)
    assert config.endswith(checkpoint["cfg"]["model"]["_name"])
    assert checkpoint["optimizer_history"][-1]["num_updates"] == 2

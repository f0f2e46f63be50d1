"""The segmented_language_modeling task through the stock commands: resuming, several workers, evaluation, errors."""

import json
import math
import random
import re
import sys
from pathlib import Path

import pytest
import torch

from cli.helpers import USER_DIR, run
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.report.perplexity import count_text, perplexities, score_text

# loaded by Python before the training: ends it as kill -9 does, when it is about to rename that checkpoint into place
KILL = """
import os, sys
def kill(event, args):
    if event == "os.rename" and str(args[1]).endswith("checkpoint_2_20.pt"):
        os.kill(os.getpid(), 9)
sys.addaudithook(kill)
"""
TASK = [
    "--user-dir",
    USER_DIR,
    "--task",
    "segmented_language_modeling",
    "--tokens-per-sample",
    "7",
    "--cpu",
    "--log-format",
    "json",
]
MODEL = (
    "--arch par_transformer_xl --decoder-embed-dim 16 --decoder-ffn-embed-dim 16 --decoder-attention-heads 2 "
    "--layout af*2 --memory-length 11 --optimizer adam --lr 0.01"
).split()


def train(data, save_dir, *more, dropout="0", **kwargs):
    return run("fairseq-train", *train_flags(data, save_dir, *more, dropout=dropout), **kwargs)


def train_flags(data, save_dir, *more, dropout="0"):
    return [
        data,
        *TASK,
        *MODEL,
        "--dropout",
        dropout,
        "--max-epoch",
        "2",
        "--num-workers",
        "0",
        "--log-interval",
        "1",
        "--no-epoch-checkpoints",
        "--save-dir",
        save_dir,
        *more,
    ]


def torchrun(command, *args):
    return run("torchrun", "--nproc-per-node", "2", Path(sys.executable).parent / command, *args)


def output(done):
    return done.stdout + done.stderr


def logged(done, tag, *names):
    """``names`` of every JSON record that a command logged as ``tag``."""
    lines = [line for line in output(done).splitlines() if f"| INFO | {tag} | {{" in line]
    return [tuple(json.loads(line.split(" | ")[-1])[name] for name in names) for line in lines]


def saved(save_dir):
    return torch.load(save_dir / "checkpoint_last.pt", weights_only=True)


def error(done):
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and len(errors) == 1 and "Traceback" not in output(done), done.stderr
    return errors[0]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Lines of 0 to 12 words of a vocabulary of 30."""
    folder, rng = tmp_path_factory.mktemp("text"), random.Random(1)
    for split, lines in ("train", 69), ("valid", 17):
        words = ([f"w{rng.randrange(30)}" for _ in range(rng.randint(0, 12))] for _ in range(lines))
        (folder / f"{split}.txt").write_text("".join(" ".join(line) + "\n" for line in words))
    run(
        "fairseq-preprocess",
        "--only-source",
        "--trainpref",
        folder / "train.txt",
        "--validpref",
        folder / "valid.txt",
        "--destdir",
        folder / "bin",
    )
    return folder / "bin"


def tokens(data, split):
    return sum(len(line.split()) + 1 for line in (data.parent / f"{split}.txt").read_text().splitlines())


@pytest.fixture(scope="module")
def one(data, tmp_path_factory):
    """Two epochs of one worker that reads four streams."""
    save_dir = tmp_path_factory.mktemp("one")
    return save_dir, train(data, save_dir, "--batch-size", "4")


@pytest.fixture(scope="module")
def two(data, tmp_path_factory):
    """The same, of two workers that read two streams each, up to update 25, which is within the second epoch."""
    save_dir = tmp_path_factory.mktemp("two")
    flags = train_flags(data, save_dir, "--batch-size", "2", "--max-update", "25")
    return save_dir, torchrun("fairseq-train", *flags)


def test_resumes_after_kill(data, tmp_path):
    flags = ["--batch-size", "3", "--update-freq", "2", "--save-interval-updates", "5"]
    whole = train(data, tmp_path / "whole", *flags, dropout="0.2")
    (tmp_path / "sitecustomize.py").write_text(KILL)
    env = {"PYTHONPATH": f"{tmp_path}:{Path(USER_DIR).parent}"}
    killed = train(data, tmp_path / "killed", *flags, dropout="0.2", check=False, env=env)
    assert killed.returncode == -9
    state = saved(tmp_path / "killed")["extra_state"]
    assert state["train_iterator"]["epoch"] == 2 and state["train_iterator"]["iterations_in_epoch"] > 0
    assert [
        memory is not None and tuple(memory.shape) for memory in state["SegmentedLanguageModelingTask"]["states"]
    ] == [(3, 11, 16), False, (3, 11, 16), False]
    resumed = train(data, tmp_path / "killed", *flags, dropout="0.2")
    assert "starts empty" not in output(resumed)
    for tag in "train", "valid":
        names = [f"{tag}_{name}" for name in ("loss", "num_updates", "wpb")]
        assert logged(resumed, tag, *names)[-1] == logged(whole, tag, *names)[-1]
    for name, weight in saved(tmp_path / "whole")["model"].items():
        assert torch.equal(saved(tmp_path / "killed")["model"][name], weight), name


def test_two_workers_read_what_one_reads(data, one, two):
    names = ("loss", "wpb", "bsz", "num_updates", "epoch")
    updates = logged(two[1], "train_inner", *names)
    assert len(updates) == 25
    assert sum(int(record[1]) for record in updates if record[4] == 1) == tokens(data, "train")
    for mine, theirs in zip(updates, logged(one[1], "train_inner", *names), strict=False):
        assert float(mine[0]) == pytest.approx(float(theirs[0]), abs=2e-3) and mine[1:] == theirs[1:]
    valid = logged(two[1], "valid", "valid_loss")[0] + logged(one[1], "valid", "valid_loss")[0]
    assert float(valid[0]) == pytest.approx(float(valid[1]), abs=2e-3)


def test_one_worker_goes_on_with_the_streams_of_two(data, one, two, tmp_path):
    flags = ["--batch-size", "4", "--restore-file", two[0] / "checkpoint_last.pt"]
    assert "starts empty" not in output(train(data, tmp_path, *flags))
    for name, weight in saved(one[0])["model"].items():
        torch.testing.assert_close(saved(tmp_path)["model"][name], weight, rtol=1e-3, atol=1e-4, msg=name)


def test_evaluation_is_over_every_token(data, one):
    checkpoint = one[0] / "checkpoint_last.pt"
    trained = logged(one[1], "valid", "valid_loss", "valid_ppl")[-1]
    validated = run("fairseq-validate", data, *TASK, "--path", checkpoint, "--batch-size", "4")
    assert logged(validated, "valid", "valid_loss", "valid_ppl")[-1] == trained
    evaluated = run("fairseq-eval-lm", data, *TASK, "--path", checkpoint, "--batch-size", "4", "--gen-subset", "valid")
    loss, perplexity = re.search(r"Loss \(base 2\): ([\d.]+), Perplexity: ([\d.]+)", output(evaluated)).groups()
    assert (f"{float(loss):.3f}", perplexity) == trained
    assert f"Evaluated {tokens(data, 'valid')} tokens" in output(evaluated)
    two = torchrun("fairseq-validate", data, *TASK, "--path", checkpoint, "--batch-size", "2")
    assert set(logged(two, "valid", "valid_loss", "valid_ppl")) == {trained}


def test_perplexity_script(data, one):
    script = Path(USER_DIR).parent / "scripts" / "evaluate_perplexity.py"
    checkpoint, raw = one[0] / "checkpoint_last.pt", data.parent / "valid.txt"
    scored = json.loads(
        run(
            "python", script, checkpoint, data, "--split", "valid", "--batch-size", "4", "--cpu", "--json", "--raw", raw
        ).stdout
    )
    units = scored["per"]
    assert f"{units['token']['perplexity']:.2f}" == logged(one[1], "valid", "valid_ppl")[-1][0]
    words = len(raw.read_text().split())
    assert {unit: row["count"] for unit, row in units.items()} == {
        "token": tokens(data, "valid"),
        "word or line end": words + scored["lines"],
        "word": words,
        "character": len(raw.read_text()),
        "byte": len(raw.read_bytes()),
    }
    for row in units.values():
        assert row["perplexity"] == pytest.approx(math.exp(scored["nll"] / row["count"]))


def test_perplexity_of_other_options(data, one):
    checkpoint = one[0] / "checkpoint_last.pt"
    same, longer = (
        score_text(checkpoint, data, "valid", 4, overrides=overrides)
        for overrides in ({"memory_length": 11}, {"memory_length": 30})
    )
    assert same.tokens == longer.tokens and same.nll != longer.nll
    assert f"{perplexities(same)['token']['perplexity']:.2f}" == logged(one[1], "valid", "valid_ppl")[-1][0]
    with pytest.raises(UsageError, match="they must be the same text"):
        perplexities(same, count_text(data.parent / "train.txt"))
    with pytest.raises(UsageError, match="par_transformer_xl.* has no --attention-span"):
        score_text(checkpoint, data, "valid", overrides={"attention_span": 3})
    with pytest.raises(UsageError, match="--context-window is for models without a memory"):
        score_text(checkpoint, data, "valid", context_window=3)


def test_other_number_of_streams_resumes_with_a_warning(data, two, tmp_path):
    flags = [
        "--batch-size",
        "8",
        "--max-update",
        "27",
        "--disable-validation",
        "--restore-file",
        two[0] / "checkpoint_last.pt",
    ]
    resumed = train(data, tmp_path, *flags)
    warnings = [line.split(" | ")[-1] for line in output(resumed).splitlines() if "| WARNING |" in line]
    assert len(warnings) == 2 and "goes on after segment 3" in warnings[0] and "starts empty" in warnings[1]
    assert [record[0] for record in logged(resumed, "train_inner", "num_updates")] == ["26", "27"]


def test_too_many_streams(data, tmp_path):
    done = train(data, tmp_path, "--batch-size", "200", check=False)
    assert f"the valid text has {tokens(data, 'valid')} tokens, too few for 200 streams" in error(done)
    assert not list(tmp_path.glob("*.pt"))

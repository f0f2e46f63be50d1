"""A figure is that of all samples, or the command ends: nothing is left out unasked."""

import logging
import math
import re
import shutil

import fairseq_cli.eval_lm
import numpy as np
import pytest
import torch
from cli.helpers import call
from fairseq.data import FairseqDataset
from fairseq.tasks import FairseqTask
from families import FAMILIES, write_data

from fairseq_adaptive.compat import omissions
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.report.perplexity import score_text

COMMON = "--cpu --num-workers 0 --required-batch-size-multiple 1".split()
SKIP = omissions.SKIP
STOCK = (
    "--task language_modeling --arch transformer_lm --decoder-layers 1 --decoder-embed-dim 16 --batch-size 10 "
    "--decoder-ffn-embed-dim 32 --decoder-attention-heads 2 --tokens-per-sample 24"
)
MODELS = {
    "stock": ("text", STOCK),
    **{name: FAMILIES[name] for name in ("shared_transformer", "shared_transformer_lm", "par_transformer_xl")},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = write_data(tmp_path_factory.mktemp("data"))
    for path in (folder / "pairs").glob("train.src-tgt.*.*"):
        shutil.copy(path, path.with_name(path.name.replace("train", "valid")))
    return folder


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """``trained(name)``: the checkpoint of a model after one update."""
    checkpoints = {}

    def trained(name):
        if name not in checkpoints:
            folder, flags = MODELS[name]
            save_dir = tmp_path_factory.mktemp(name)
            call(
                "fairseq-train",
                data / folder,
                *COMMON,
                "--max-update",
                1,
                "--disable-validation",
                "--optimizer",
                "adam",
                "--save-dir",
                save_dir,
                *flags.split(),
            )
            checkpoints[name] = save_dir / "checkpoint_last.pt"
        return checkpoints[name]

    return trained


@pytest.fixture
def eval_lm(data, trained, caplog, monkeypatch):
    """``eval_lm(model, *flags)``: the loss of a text in bits, and the number of tokens."""
    monkeypatch.setattr(fairseq_cli.eval_lm, "eval_lm", fairseq_cli.eval_lm.eval_lm)
    omissions.refuse_empty_perplexity()  # the command was imported before it, as where a user starts it

    def eval_lm(name, *flags):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            call("fairseq-eval-lm", data / "text", *COMMON, "--gen-subset", "train", "--path", trained(name), *flags)
        loss = re.search(r"Loss \(base 2\): ([\d.]+)", caplog.text)[1]
        return float(loss), int(re.search(r"Evaluated ([\d,]+) tokens", caplog.text)[1].replace(",", ""))

    return eval_lm


def tokens_of(data):
    from fairseq.data import data_utils

    lines = data_utils.load_indexed_dataset(str(data / "text" / "train"))  # its sizes live as long as it does
    return int(lines.sizes.sum())


@pytest.mark.parametrize(
    "name,length,flags",
    (
        ("stock", 24, ()),
        ("shared_transformer_lm", 24, ()),
        ("par_transformer_xl", 12, ("--task", "segmented_language_modeling", "--batch-size", "4")),
    ),
)
def test_eval_lm_takes_the_trained_length(name, length, flags, data, eval_lm, caplog):
    found = eval_lm(name, *flags)
    assert f"--tokens-per-sample {length}, as in the training of" in caplog.text
    assert found[1] == tokens_of(data)
    assert found == eval_lm(name, *flags, "--tokens-per-sample", length)
    assert "as in the training of" not in caplog.text


@pytest.mark.parametrize("name", ("stock", "shared_transformer_lm"))
def test_eval_lm_refuses_what_it_left_out(name, eval_lm):
    whole = pytest.raises(
        UsageError,
        match=r"\d+ of \d+ samples are longer than 24 .* longest have 1024.*"
        f"--tokens-per-sample.*{SKIP}",
    )
    with whole:
        eval_lm(name, "--tokens-per-sample=1024")
    with pytest.raises(UsageError, match="no sample is left"):
        eval_lm(name, "--tokens-per-sample", "1024", SKIP)


def test_eval_lm_skips_what_it_is_asked_to(data, eval_lm):
    # 25 tokens in all but the last block, so that only this one fits
    with pytest.raises(UsageError, match=f"{tokens_of(data) // 25} of {-(-tokens_of(data) // 25)} samples"):
        eval_lm("stock", "--tokens-per-sample", "25")
    assert eval_lm("stock", "--tokens-per-sample", "25", SKIP)[1] == tokens_of(data) % 25 > 0


def test_eval_lm_of_no_token(eval_lm):
    with pytest.raises(UsageError, match="there is no token"):
        eval_lm("stock", "--num-shards", "1000", "--shard-id", "999")


def test_eval_lm_of_a_shard_says_so(eval_lm, caplog):
    eval_lm("stock", "--batch-size", "20", "--num-shards", "2", "--shard-id", "1")
    assert "shard 1 of 2: the perplexity below is that of its samples alone" in caplog.text


def test_tokens_of_probability_0_are_not_left_out(eval_lm, monkeypatch):
    stock = fairseq_cli.eval_lm.SequenceScorer

    class Impossible(stock):
        def generate(self, models, sample, **kwargs):
            found = super().generate(models, sample, **kwargs)
            found[0][0]["positional_scores"][3] = -math.inf
            return found

    monkeypatch.setattr(fairseq_cli.eval_lm, "SequenceScorer", Impossible)
    with pytest.raises(UsageError, match=r"1 of [\d,]+ tokens of a batch have probability 0"):
        eval_lm("stock")
    assert fairseq_cli.eval_lm.SequenceScorer is Impossible


def test_context_beyond_the_model_is_refused(data, trained):
    whole = score_text(trained("shared_transformer_lm"), data / "text", "train", context_window=12)
    assert whole.tokens == tokens_of(data)
    with pytest.raises(UsageError, match="segments of 30 tokens, .* are longer than the 24 positions"):
        score_text(trained("shared_transformer_lm"), data / "text", "train", tokens_per_sample=30, context_window=12)


@pytest.mark.parametrize("command", ("generate", "interactive", "validate", "train"))
def test_other_commands_refuse_long_samples(command, data, trained, tmp_path, monkeypatch):
    flags = [data / "pairs", *COMMON, "--batch-size", "50", "--max-source-positions", "5"]
    evaluated = ["--path", trained("shared_transformer"), "--task", "translation"]
    if command == "train":
        monkeypatch.setattr(omissions, "_skip_asked", False)
        flags += [
            *FAMILIES["shared_transformer"].flags.split(),
            "--max-update",
            1,
            "--valid-subset",
            "valid",
            "--validate-interval-updates",
            1,
            "--optimizer",
            "adam",
            "--save-dir",
            tmp_path,
        ]
    elif command == "interactive":
        (tmp_path / "input").write_text("w01 w02\n" + "w01 " * 9 + "\n")
        flags += [*evaluated, "--input", tmp_path / "input", "--buffer-size", 50, "-s", "src", "-t", "tgt"]
    elif command == "generate":
        flags += [*evaluated, "--gen-subset", "train", "--beam", 1]
    else:
        flags += [*evaluated, "--valid-subset", "train"]
    of = "1 of 2" if command == "interactive" else r"\d\d\d of 600"
    said = rf"{of} samples are longer than \(5, \d+\) .*the longest have \(1\d, ?\d+\).*{SKIP}"
    with pytest.raises(UsageError, match=said):
        call(f"fairseq-{command}", *flags)
    call(f"fairseq-{command}", *flags, SKIP)


class Sizes(FairseqDataset):
    def __init__(self, sizes):
        self.lengths = sizes

    def __len__(self):
        return len(self.lengths)

    def size(self, index):
        return self.lengths[index]


@pytest.mark.parametrize(
    "sizes,limit,longest",
    (
        ([3, 9, 8, 2], 5, "9"),
        ([(3, 1), (9, 2), (3, 8), (1, 1)], (5, 5), r"\(9, 8\)"),
        ([{"a": (3,)}, {"a": (9,)}, {"a": (8,)}, {"a": (2,)}], {"a": (5,)}, r"\{'a': \(9,\)\}"),
    ),
    ids=("one", "pair", "named"),
)
def test_kinds_of_sizes(sizes, limit, longest):
    task, indices = FairseqTask(None), np.arange(4)
    with pytest.raises(UsageError, match=f"2 of 4 samples .* the longest have {longest}"):
        task.filter_indices_by_size(indices, Sizes(sizes), limit)
    assert task.filter_indices_by_size(indices, Sizes(sizes), limit, True).tolist() == [0, 3]
    with pytest.raises(UsageError, match="2 of 2 samples .* no sample is left"):
        task.filter_indices_by_size(indices[1:3], Sizes(sizes), limit, True)


@pytest.mark.parametrize("written", ("zip", "legacy", "args", "none", "text"))
def test_trained_length_of_any_checkpoint(written, tmp_path):
    from argparse import Namespace

    path = tmp_path / "a.pt"
    state = {"cfg": {"task": {"tokens_per_sample": 24}}, "args": None}
    if written == "args":
        state = {"args": Namespace(tokens_per_sample=24)}
    if written == "text":
        path.write_text("no checkpoint")
    elif written != "none":
        torch.save(state, path, _use_new_zipfile_serialization=written != "legacy")
    assert omissions._trained_length(str(path)) == (None if written in ("none", "text") else 24)

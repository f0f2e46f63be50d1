"""examples/classification on files of the published layouts: download, texts, recipes, training, submissions."""

import csv
import importlib
import io
import json
import re
import sys
import tarfile

import pytest
from cli.glue import GLUE, WORDS, rows_of, write_glue
from cli.wmt14 import ROOT, bash, sha256
from fairseq.data import Dictionary
from sklearn.metrics import accuracy_score, f1_score

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.hub import TranskimmerClassifier
from fairseq_adaptive.interop.checkpoint import save_checkpoint
from fairseq_adaptive.interop.conversion import new_state

EXAMPLE = ROOT / "examples" / "classification"
FLAGS = {
    "encoder_layers": 2,
    "encoder_embed_dim": 16,
    "encoder_ffn_embed_dim": 32,
    "encoder_attention_heads": 2,
    "max_positions": 24,
}
MODEL = [part for name, value in FLAGS.items() for part in ("--" + name.replace("_", "-"), value)]


@pytest.fixture(scope="module")
def texts():
    sys.path.insert(0, str(EXAMPLE))
    try:
        yield importlib.import_module("texts")
    finally:
        sys.path.remove(str(EXAMPLE))


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """Small archives of the layout and the names of the real ones, and their checksums."""
    folder = tmp_path_factory.mktemp("archives")
    write_glue(folder)
    reviews = io.StringIO()
    csv.writer(reviews, quoting=csv.QUOTE_ALL).writerows([["5", 'so "good",\\n it works'], ["1", "bad"]])
    trees = {
        "20news-bydate.tar.gz": {
            f"20news-bydate-{split}/{group}/{number}": f"Subject: x\n\n{group}\té\n".encode("latin-1")
            for split in ("train", "test")
            for group in ("sci.med", "alt.atheism")
            for number in (1, 2)
        },
        "aclImdb_v1.tar.gz": {
            f"aclImdb/{split}/{label}/0_3.txt": f"a {label}<br /><br />é film".encode()
            for split in ("train", "test")
            for label in ("pos", "neg")
        },
        "yelp_review_full_csv.tgz": {
            f"yelp_review_full_csv/{split}.csv": reviews.getvalue().encode() for split in ("train", "test")
        },
    }
    for name, files in trees.items():
        with tarfile.open(folder / name, "w:gz") as archive:
            for path, content in files.items():
                info = tarfile.TarInfo(path)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    (folder / "SUMS").write_text("".join(f"{sha256(path)}  {path.name}\n" for path in sorted(folder.iterdir())))
    return folder


@pytest.fixture(scope="module")
def raw(archives, tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw")
    for task in ("glue", "20news", "imdb", "yelp", "RTE"):  # RTE is there already
        bash(EXAMPLE / "download.sh", task, folder, "--mirror", f"file://{archives}", "--checksums", archives / "SUMS")
    return folder


def test_texts_of_all_data_sets(raw, texts):
    for task, (_, _, places, label) in GLUE.items():
        found = {name: list(rows) for name, rows in texts.parts_of(task, raw)}
        if task == "MRPC":
            rows = list(rows_of(task, 64, 1))
            expected = {"dev": rows[5::4], "train": [row for row in rows if row not in rows[5::4]]}
        else:
            expected = {"train": list(rows_of(task, 48, 1)), "dev": list(rows_of(task, 16, 2))}
        for split, rows in expected.items():
            assert found[split] == [(row[label], *(row[place] for place in places)) for row in rows], (task, split)
        hidden = {f"submission/{name}" for name in (["MNLI-m", "MNLI-mm", "AX"] if task == "MNLI" else [task])}
        assert set(found) - {"train", "dev", "dev_mismatched"} == hidden
        assert all([row[0] for row in found[name]] == ["0", "1", "2"] for name in hidden)
    others = {task: dict(texts.parts_of(task, raw)) for task in texts.OTHERS}
    assert [list(rows) for rows in others["20news"].values()] == 2 * [
        [(group, f"Subject: x {group} é") for group in ("alt.atheism", "sci.med") for _ in (1, 2)]
    ]
    assert [list(rows) for rows in others["imdb"].values()] == 2 * [[("neg", "a neg é film"), ("pos", "a pos é film")]]
    assert list(others["yelp"]["test"]) == [("5", 'so "good", it works'), ("1", "bad")]


def test_lines(texts, tmp_path):
    path = tmp_path / "texts"
    path.write_text("1 a film\n0\ta\tb\r\nx\n")
    assert list(texts.read_texts(path)) == [["1", "a film"], ["0", "a\tb"], ["x", ""]]
    for content, pairs, message in (("1\ta\n", True, "line 1: 2 fields"), ("\ta\n", False, "line 1: there is no")):
        path.write_text(content)
        with pytest.raises(UsageError, match=message):
            list(texts.read_texts(path, pairs))


@pytest.fixture(scope="module")
def prepared(raw, tmp_path_factory):
    """MRPC: its texts, a model's folder, and what prepare.sh makes of both."""
    folder = tmp_path_factory.mktemp("mrpc")
    bash("-c", f"python3 {EXAMPLE}/texts.py MRPC {raw} {folder}/texts")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    (folder / "dict.txt").write_text("".join(f"{word} 1\n" for word in ["<mask>", *WORDS]))
    bash(EXAMPLE / "prepare.sh", folder / "texts", folder, folder, folder / "out", "--pairs", "--max-length", "12")
    return folder


def test_trains_scores_and_writes_submissions(prepared, build, tmp_path):
    dictionary = Dictionary.load(str(prepared / "dict.txt"))
    state = new_state(["--arch", "transkimmer_bert_base", *MODEL], {})
    state["model"] = build("transkimmer_bert_base", words=dictionary, **FLAGS).float().state_dict()
    save_checkpoint(state, tmp_path / "start.pt")
    log = bash(
        EXAMPLE / "train.sh",
        prepared / "out",
        tmp_path / "start.pt",
        "transkimmer_bert_base",
        "MRPC",
        tmp_path,
        "skim",
        *MODEL,
        "--cpu",
        "--num-workers",
        "0",
        "--lr",
        "0.01",
        "--skim-bias",
        "1",
        "--log-interval",
        "1",
    )
    (valid, *_) = re.findall(r"epoch 005 \| valid on .*", log.stdout + log.stderr)
    logged = {name: float(value) for name, value in re.findall(r"\| (\w+) ([-\d.]+)", valid)}
    done = bash(
        "-c",
        f"cd {tmp_path}; python3 {EXAMPLE}/evaluate.py MRPC {prepared}/texts --path checkpoint_last.pt "
        "--submission glue --batch-size 5",
    )
    f1, accuracy = map(float, re.search(r"dev.txt: 15 texts, F1 ([\d.]+), accuracy ([\d.]+)", done.stdout).groups())
    assert (f1, accuracy) == pytest.approx((logged["f1"], logged["accuracy"]), abs=0.051)

    model = TranskimmerClassifier.from_pretrained(tmp_path / "checkpoint_last.pt", device="cpu")
    rows = [line.split("\t") for line in (prepared / "texts" / "dev.txt").read_text().splitlines()]
    true, found = zip(*((row[0], each.label) for row, each in zip(rows, model.predict([row[1:] for row in rows]))))
    assert f1 == pytest.approx(100 * f1_score(true, found, pos_label="1"), abs=0.01)
    assert accuracy == pytest.approx(100 * accuracy_score(true, found), abs=0.01)
    index, *lines = (tmp_path / "glue" / "MRPC.tsv").read_text().splitlines()
    assert index == "index\tprediction" and [line.split("\t")[0] for line in lines] == ["0", "1", "2"]
    assert {line.split("\t")[1] for line in lines} <= {"0", "1"}

    shown = bash(
        "-c",
        f"printf 'a good film\\tit works\\n' | python3 {ROOT}/scripts/predict.py "
        f"{tmp_path}/checkpoint_last.pt --pairs --html {tmp_path}/page.html",
    )
    label, probability, text = shown.stdout.strip().split("\t")
    assert label in "01" and 0.5 <= float(probability) <= 1
    assert [each.rpartition("/")[0] for each in text.split()] == "<s> ▁a ▁good ▁film </s> ▁it ▁works </s>".split()
    assert "skimmed before layer" in (tmp_path / "page.html").read_text()

    done = bash(
        "-c",
        f"cd {tmp_path}; python3 {ROOT}/scripts/benchmark/classification.py {prepared}/out/bin "
        "one=checkpoint_last.pt two=checkpoint_best.pt,checkpoint_last.pt --rounds 1 --batch-sizes 4 "
        f"--output a.json; python3 {EXAMPLE}/plot_tradeoff.py MRPC=a.json --batch-size 4 --output a.png",
    )
    one, two = json.loads((tmp_path / "a.json").read_text())["models"]
    assert one["accuracy"] == pytest.approx(accuracy, abs=0.01) == two["accuracies"][1]
    assert one["flops_speedup"] == pytest.approx(1 / logged["flops"], rel=1e-3) and two["speed"]["4"]
    assert done.stdout.count("\n| ") == 3 and (tmp_path / "a.png").stat().st_size > 5000


def test_words_as_they_are(tmp_path):
    """Every 20th text is held out, the first words stay, rare ones and those beyond the dictionary are unknown."""
    (tmp_path / "texts").mkdir()
    lines = [f"{'ab'[number % 2]}\tOften both w{number} cut" for number in range(40)]
    (tmp_path / "texts" / "train.txt").write_text("\n".join(lines) + "\n")
    (tmp_path / "texts" / "test.txt").write_text("a often Never\n")
    flags = ("--first", "3", "--lower", "--threshold", "2")
    bash(EXAMPLE / "words.sh", tmp_path / "texts", tmp_path / "out", *flags)
    text = {split: (tmp_path / "out" / "text" / f"{split}.input0").read_text() for split in ("train", "dev", "test")}
    assert text["dev"] == "often both w19\noften both w39\n" and text["test"] == "often never\n"
    assert text["train"].count("\n") == 38 and "cut" not in text["train"]
    words = Dictionary.load(str(tmp_path / "out" / "bin" / "input0" / "dict.txt"))
    assert {"often", "both"} == {word for word in words.symbols[words.nspecial :] if not word.startswith("madeup")}
    assert Dictionary.load(str(tmp_path / "out" / "bin" / "label" / "dict.txt")).symbols[-2:] == ["a", "b"]
    bash(EXAMPLE / "words.sh", tmp_path / "texts", tmp_path / "few", "--words", "5")
    assert len(Dictionary.load(str(tmp_path / "few" / "bin" / "input0" / "dict.txt"))) == 8
    for arguments, message in (
        ([tmp_path / "texts", tmp_path / "few"], "few exists and is left as it is"),
        ([tmp_path / "few", tmp_path / "new"], "train.txt is missing or empty"),
        ([tmp_path / "texts", tmp_path / "new", "--first", "0"], "--first takes a positive number, not '0'"),
    ):
        done = bash(EXAMPLE / "words.sh", *arguments, check=False)
        assert done.returncode == 1 and message in done.stderr and not (tmp_path / "new").exists()


def recipe(tmp_path, *arguments):
    """The flags with which train.sh calls fairseq-train."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    (tmp_path / "bin" / "fairseq-train").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "bin" / "fairseq-train").chmod(0o755)
    (tmp_path / "text").mkdir(exist_ok=True)
    (tmp_path / "text" / "train.input0").write_text("a\n" * 1000)
    (tmp_path / "model.pt").touch()
    done = bash(EXAMPLE / "train.sh", tmp_path, tmp_path / "model.pt", *arguments, path=[tmp_path / "bin"])
    flags = done.stdout.split("\n")
    return {flag: value for flag, value in zip(flags, flags[1:]) if flag.startswith("--")}


def test_published_recipes(tmp_path):
    names = (
        "num-classes",
        "lr",
        "batch-size",
        "max-epoch",
        "skim-factor",
        "total-num-update",
        "warmup-updates",
        "best-checkpoint-metric",
    )
    for task, expected in {
        "SST-2": ("2", "2e-5", "64", "3", "0.5", "48", "0", "accuracy"),
        "CoLA": ("2", "2e-5", "64", "3", "0.5", "48", "0", "mcc"),
        "MRPC": ("2", "2e-5", "64", "5", "0.5", "80", "0", "acc_and_f1"),
        "STS-B": ("1", "2e-5", "64", "3", "0.5", "48", "0", "pearson_and_spearman"),
        "MNLI": ("3", "2e-5", "64", "3", "0.5", "48", "0", "accuracy"),
        "WNLI": ("2", "2e-5", "64", "5", "0.5", "80", "0", "accuracy"),
        "20news": ("20", "3e-5", "32", "5", "0.2", "160", "16", "accuracy"),
        "yelp": ("5", "3e-5", "32", "2", "0.2", "64", "6", "accuracy"),
        "imdb": ("2", "2e-5", "64", "3", "0.5", "48", "0", "accuracy"),
    }.items():
        flags = recipe(tmp_path, "transkimmer_minilm_l6", task, "save", "skim")
        assert tuple(flags[f"--{name}"] for name in names) == expected, task
        assert "--separator-token" not in flags and ("--regression-target" in flags) == (task == "STS-B")
        assert ("--task-criterion-args" in flags) == (task in ("CoLA", "MRPC", "STS-B"))
    assert recipe(tmp_path, "transkimmer_base", "RTE", "save", "skim")["--separator-token"] == "2"  # RoBERTa
    dense = recipe(tmp_path, "transkimmer_base", "CoLA", "save", "dense")
    assert "--report-mcc" in dense and "--no-skimming" in dense and dense["--criterion"] == "sentence_prediction"
    assert "--lr-scheduler" not in recipe(tmp_path, "transkimmer_base", "7", "save", "skim")


def test_errors(archives, prepared, tmp_path):
    out, minimal = prepared / "out", ["transkimmer_bert_base", "MRPC", tmp_path / "save", "dense"]
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "train.txt").write_text("very good\ta film\n" * 40)
    (tmp_path / "SUMS").write_text("0" * 64 + "  RTE.zip\n")
    for script, arguments, status, message in [
        ("download.sh", ["SNLI", tmp_path / "raw"], 1, "download: there is no TASK 'SNLI'"),
        (
            "download.sh",
            ["RTE", tmp_path / "raw", "--mirror", "file:///absent"],
            1,
            "cannot download file:///absent/RTE.zip",
        ),
        ("download.sh", ["RTE", archives, "--checksums", tmp_path / "SUMS"], 1, "RTE.zip is damaged or another"),
        ("prepare.sh", [tmp_path, prepared, prepared, tmp_path / "out"], 1, "train.txt is missing or empty"),
        ("prepare.sh", [prepared / "texts", prepared, prepared, out], 1, "exists and is left as it is"),
        (
            "prepare.sh",
            [tmp_path / "texts", prepared, prepared, tmp_path / "out"],
            1,
            "dev.txt, line 1: the label 'very good' is not one word",
        ),
        ("train.sh", [out, tmp_path / "absent.pt", *minimal], 1, "there is no checkpoint"),
        ("train.sh", [out, archives / "SUMS", minimal[0], "MRPB", *minimal[2:]], 2, "usage: bash train.sh"),
        (
            "tradeoff.sh",
            ["SST-2", tmp_path / "texts", archives / "SUMS", tmp_path / "out", "valid"],
            1,
            "train.input0 is missing: run prepare.sh",
        ),
        (
            "train.sh",
            [out, archives / "SUMS", minimal[0], "3", *minimal[2:], "--cpu"],
            1,
            "label/dict.txt has 2 labels (1, 0): set --num-classes 2",
        ),
    ]:
        done = bash(EXAMPLE / script, *arguments, check=False)
        assert done.returncode == status and message in done.stderr and "Traceback" not in done.stderr, done.stderr
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob("save/*"))

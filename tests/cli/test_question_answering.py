"""Question answering through the stock commands: trained with skimming, validated, answers written, scored."""

import json
import random
import re
import sys
from pathlib import Path

import pytest
from cli.helpers import USER_DIR, run
from fairseq.data import Dictionary

from fairseq_adaptive.report.compute_report import compute_report

pytest.importorskip("tokenizers", reason="tokenizers is not installed (extra hf)")
ROOT = Path(__file__).parents[2]
SCRIPT, EXAMPLE = ROOT / "scripts" / "answer_questions.py", ROOT / "examples" / "question_answering"
NAMES, PLACES = [f"name{number}" for number in range(8)], [f"place{number}" for number in range(8)]
FLAGS = (
    "--task question_answering --max-positions 24 --doc-stride 6 --arch transkimmer_base --token-types 2 "
    "--encoder-layers 2 --encoder-embed-dim 32 --encoder-ffn-embed-dim 64 --encoder-attention-heads 4 "
    "--dropout 0.0 --attention-dropout 0.0 --criterion skim_loss --task-criterion span_prediction "
    "--skim-factor 0.01 --optimizer adam --lr 2e-3 --batch-size 32 --max-update 30 --log-format simple --cpu "
    "--num-workers 0 --seed 1 --required-batch-size-multiple 1 --best-checkpoint-metric f1 "
    "--maximize-best-checkpoint-metric"
).split()


def squad(size, seed):
    """The place of a name, or no answer where the name is not in the text."""
    rng, qas = random.Random(seed), []
    for number in range(size):
        chosen = rng.sample(NAMES, 4)
        context = ". ".join(f"The {name} is in {rng.choice(PLACES)}" for name in chosen[:3]) + "."
        asked = rng.choice(chosen)
        at = context.find(asked + " is in ")
        start = at + len(asked) + 7
        answers = [] if at < 0 else [{"text": context[start : start + 6], "answer_start": start}]
        qas.append(
            (
                context,
                {"id": f"q{number}", "question": f"Where is {asked}?", "answers": answers, "is_impossible": at < 0},
            )
        )
    return {"data": [{"title": "Places", "paragraphs": [{"context": c, "qas": [q]} for c, q in qas]}]}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("squad")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "is", "in", "where", "?", ".", *NAMES, *PLACES]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    dictionary = Dictionary()
    for word in ["<mask>", *words[5:]]:
        dictionary.add_symbol(word)
    dictionary.save(str(folder / "dict.txt"))
    for split, size, seed in (("train", 400, 1), ("valid", 40, 2)):
        (folder / f"{split}.json").write_text(json.dumps(squad(size, seed)))
    return folder


def valid_line(done):
    return re.findall(r"valid on 'valid' subset .*", done.stdout + done.stderr)[-1]


def figures_of(done):
    return tuple(float(re.search(rf"\| {name} ([\d.]+)", valid_line(done))[1]) for name in ("em", "f1"))


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A folder of checkpoints, and the last exact match and F1 that training logged."""
    folder = tmp_path_factory.mktemp("trained")
    done = run("fairseq-train", data, "--user-dir", USER_DIR, *FLAGS, "--save-dir", folder)
    assert "| kept " in valid_line(done) and "| flops_speedup" in valid_line(done)
    return folder, *figures_of(done)


def test_answers(data, trained, tmp_path):
    folder, em, f1 = trained
    done = run(
        "python",
        SCRIPT,
        data / "valid.json",
        "--path",
        folder / "checkpoint_last.pt",
        "--cpu",
        "--output",
        tmp_path / "answers",
        "--batch-size",
        "7",
    )
    figures = json.loads(done.stdout[: done.stdout.index("}") + 1])
    assert (figures["exact"], figures["f1"]) == pytest.approx((em, f1), abs=0.01)
    assert figures["total"] == 40 and figures["best_f1"] >= figures["f1"] > 0
    answers, lists, odds = (
        json.loads((tmp_path / "answers" / f"{name}.json").read_text())
        for name in ("predictions", "nbest_predictions", "null_odds")
    )
    assert answers.keys() == lists.keys() == odds.keys() == {f"q{number}" for number in range(40)}
    for name, best in lists.items():
        assert sum(each["probability"] for each in best) == pytest.approx(1)
        texts = [each["text"] for each in best]
        assert "" in texts and len(set(texts)) == len(texts) <= 21
        assert answers[name] == ("" if odds[name] > 0 else next(text for text in texts if text))

    spoilt = data / "spoilt.json"
    spoilt.write_text((data / "valid.json").read_text().replace('"answer_start": ', '"answer_start": 1', 1))
    done = run(
        "python",
        SCRIPT,
        spoilt,
        "--path",
        folder / "checkpoint_last.pt",
        "--cpu",
        "--output",
        tmp_path / "new",
        check=False,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr and not (tmp_path / "new").exists()
    assert re.search(r"error: .*spoilt.json, question q\d+: the answer", done.stderr.strip().splitlines()[-1])


def test_the_report_has_the_official_figures(data, trained):
    folder, em, f1 = trained
    (found,) = compute_report([str(folder / "checkpoint_last.pt")], str(data), texts=16, rounds=1)["models"]
    assert (found["quality"]["em"], found["quality"]["f1"]) == pytest.approx((em, f1), abs=0.01)
    assert found["task"] == "question_answering" and 16 <= found["texts"] < 24 <= found["tokens"]
    rows = found["stacks"]["encoder.sentence_encoder.layers"]["depths"]
    assert all(0 <= row["kept"] == row["alive"] <= 1 for row in rows)


def test_workers_share_the_windows_of_a_question(data, trained):
    folder, em, f1 = trained
    validate = Path(sys.executable).parent / "fairseq-validate"
    done = run(
        "torchrun",
        "--nproc-per-node",
        "2",
        validate,
        data,
        "--user-dir",
        USER_DIR,
        "--task",
        "question_answering",
        "--path",
        folder / "checkpoint_last.pt",
        "--valid-subset",
        "valid",
        "--batch-size",
        "1",
        "--required-batch-size-multiple",
        "1",
        "--cpu",
        "--num-workers",
        "0",
        "--log-format",
        "simple",
        "--distributed-backend",
        "gloo",
    )
    assert figures_of(done) == (em, f1)


def test_splits_by_article(tmp_path):
    articles = [
        {"title": f"t{number % 20}", "paragraphs": squad(5, number)["data"][0]["paragraphs"]} for number in range(40)
    ]
    for number, article in enumerate(articles):
        for paragraph in article["paragraphs"]:
            paragraph["qas"][0]["id"] += f"-{number}"
    (tmp_path / "all.json").write_text(json.dumps({"version": "v2.0", "data": articles}))
    arguments = [tmp_path / f"{name}.json" for name in ("all", "train", "valid")]
    run("python", EXAMPLE / "split.py", *arguments, "--valid-share", "0.15")
    whole, train, valid = (json.loads(path.read_text()) for path in arguments)
    assert train["version"] == valid["version"] == "v2.0"
    assert sorted(train["data"] + valid["data"], key=articles.index) == whole["data"]
    titles = [{article["title"] for article in part["data"]} for part in (train, valid)]
    assert not titles[0] & titles[1] and len(titles[1]) == 3  # 15% of 20 articles of equal size

    done = run("python", EXAMPLE / "split.py", *arguments, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.match("error: .*train.json exists and is left as it is", done.stderr.splitlines()[-1])

"""examples/classification/own.sh: texts of one's own in one command; what is refused first, and what a second call does."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from cli.wmt14 import ROOT
from fairseq_adaptive.errors import UsageError
from pages import stand_ins

EXAMPLE = ROOT / "examples" / "classification"


@pytest.fixture(scope="module")
def describe():
    sys.path.insert(0, str(EXAMPLE))
    spec = importlib.util.spec_from_file_location("describe", EXAMPLE / "describe.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(EXAMPLE))
    return module


def write(folder, config=None, **texts):
    folder.mkdir()
    for name, lines in texts.items():
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    (folder / "vocab.txt").write_text("a\n")
    size = {"hidden_size": 384, "num_hidden_layers": 6}
    (folder / "config.json").write_text(json.dumps(size if config is None else config))
    return folder


def said(describe, folder, monkeypatch, capsys, *flags):
    monkeypatch.setattr(sys, "argv", ["describe.py", str(folder), str(folder), *flags])
    describe.main()
    return capsys.readouterr()


GOOD = ["good\ta film", "bad a film"]


def test_what_there_is_comes_first(describe, tmp_path, monkeypatch, capsys):
    folder = write(tmp_path / "texts", train=GOOD * 50, test=GOOD)
    out, errors = said(describe, folder, monkeypatch, capsys, "--batch-size", "10", "--epochs", "2")
    assert out == "2 bert transkimmer_minilm_l6 20\n"
    assert "95 texts to train on, 5 to choose by, 2 to test on; 2 labels, the most frequent good with 50.0%" in errors
    assert "20 updates of 10 texts each" in errors
    (folder / "dev.txt").write_text("good\tx\n")
    out, _ = said(describe, folder, monkeypatch, capsys, "--batch-size", "10", "--epochs", "2")
    assert out.endswith(" 20\n")


@pytest.mark.parametrize(
    "texts, config, message",
    (
        ({"train": ["good\tx"] * 50}, None, "has one label, good"),
        ({"train": GOOD * 50, "dev": ["fine\tx"]}, None, "labels that train.txt has not: fine"),
        ({"train": GOOD * 5}, None, "has 10 texts and no dev.txt"),
        ({"train": [*GOOD * 50, "very good\tx"]}, None, "line 101: the label 'very good' is not one word"),
        ({"train": [*GOOD * 50, "good\t "]}, None, "line 101: there is no text behind the label 'good'"),
        ({"train": [*GOOD * 50, "\tx"]}, None, "line 101: there is no label in front"),
        (
            {"train": GOOD * 50},
            {"hidden_size": 7, "num_hidden_layers": 1},
            "a bert of 1 layers of width 7, and there are",
        ),
    ),
)
def test_what_would_fail_later_is_refused(describe, texts, config, message, tmp_path, monkeypatch, capsys):
    with pytest.raises(UsageError, match=message):
        said(describe, write(tmp_path / "texts", config, **texts), monkeypatch, capsys)


def test_an_encoder_without_a_vocabulary(describe, tmp_path):
    with pytest.raises(UsageError, match="neither vocab.txt nor vocab.json"):
        describe.encoder_of(tmp_path, None)


def test_a_second_call_goes_on_where_the_first_one_stopped(tmp_path):
    write(tmp_path / "texts", train=GOOD * 50, dev=GOOD)
    stand_ins(tmp_path / "bin")
    record = tmp_path / "record"
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "PAGE_LINE": "", "PAGE_WITHIN": ""}
    environment |= {"PAGE_RECORD": str(record)}

    def call(*flags):
        record.write_text("")
        done = subprocess.run(
            ["/bin/bash", EXAMPLE / "own.sh", "texts", "texts", "out", *flags],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        calls = [each.split("\x1f")[2:] for each in record.read_text().split("\x1e")[:-1]]
        return done, [words for words in calls if words[0] == "fairseq-train"]

    whole = (tmp_path / "bin" / "fairseq-train").read_text()
    broken = whole.replace('leave "${out:-checkpoints}"', '[[ $out != *skim ]] || exit 9; leave "${out:-checkpoints}"')
    (tmp_path / "bin" / "fairseq-train").write_text(broken)
    done, trained = call("--cpu")
    assert done.returncode == 1 and "all it said is in out/skim.log" in done.stderr and len(trained) == 2
    assert done.stderr.startswith("to do: ")
    (tmp_path / "bin" / "fairseq-train").write_text(whole)
    done, trained = call("--cpu")
    assert done.returncode == 0, done.stderr
    (skim,) = trained  # the dense model stays
    assert skim[skim.index("--distill-from") + 1] == "out/dense/checkpoint_best.pt"
    assert skim[skim.index("--target-flops") + 1] == "0.5" and skim[-1] == "--cpu"
    done, trained = call("--cpu")
    assert done.returncode == 0 and not trained
    done, _ = call("--cpu", "--epochs", "4")
    assert done.returncode == 1 and "out was begun with other texts or options" in done.stderr
    done, _ = call("--target-flops", "2")
    assert done.returncode == 1 and "is a share of 1, not '2'" in done.stderr


def test_an_interrupted_training_goes_on_from_its_checkpoint(tmp_path):
    """A second call of train.sh does not start anew from the encoder."""
    stand_ins(tmp_path / "bin")
    for name in ("data/text/train.input0", "model.pt", "data/windows"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1\n")
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "PAGE_LINE": "", "PAGE_WITHIN": ""}
    environment["PAGE_RECORD"] = str(tmp_path / "record")
    for script, words in (
        ("classification/train.sh", "data model.pt transkimmer_base 2 one dense"),
        ("question_answering/train.sh", "data model.pt transkimmer_base two dense"),
        ("pretraining/finetune.sh", "data model.pt albert_act_tiny 2 three"),
    ):
        given = []
        for _ in range(2):
            (tmp_path / "record").write_text("")
            command = ["/bin/bash", ROOT / "examples" / script, *words.split()]
            subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
            given.append((tmp_path / "record").read_text())
        assert "--restore-file\x1fmodel.pt\x1f--reset-optimizer" in given[0]
        assert "fairseq-train" in given[1] and "--restore-file" not in given[1] and "--reset" not in given[1]

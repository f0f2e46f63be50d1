"""examples/translation on text of one's own: any pair of languages, what is held out, what is refused, and goes on."""

import os
import signal
import subprocess
import time

import pytest
from fairseq.data import Dictionary

from cli.wmt14 import EXAMPLE, bash, sentences
from pages import stand_ins

PREPARE = EXAMPLE / "prepare.sh"


def write(folder, **sizes):
    folder.mkdir()
    first = 0
    for split, size in sizes.items():
        for lang, name in (("en", "fr"), ("de", "cs")):
            lines = sentences(lang, first, size)
            folder.joinpath(f"{split}.{name}").write_text("\n".join(lines) + "\n", encoding="utf-8")
        first += size
    return folder


def text_of(path):
    return path.read_text(encoding="utf-8").splitlines()


def test_what_is_not_there_is_held_out_and_pairs_stay_parallel(tmp_path):
    raw, out = write(tmp_path / "raw", train=100), tmp_path / "out"
    lines = (
        (raw / "train.fr").read_text().replace("sentence 3:", "sentence\t3:\r")
    )  # which Python's readers would split
    (raw / "train.fr").write_text(lines)
    done = bash(PREPARE, raw, out, "fr", "cs", "--bpe", "sentencepiece", "--merges", "90", "--workers", "1")
    assert "to do: fr-cs, 100 pairs" in done.stderr and "every 20th pair is held out for valid test" in done.stderr
    assert [len(text_of(out / f"{split}.fr")) for split in ("train", "valid", "test")] == [90, 5, 5]
    numbers = {}
    for split in ("train", "valid", "test"):
        pairs = zip(text_of(out / f"{split}.fr"), text_of(out / f"{split}.cs"))
        numbers[split] = [(int(one.split()[1][:-1]), int(other.split()[1][:-1])) for one, other in pairs]
        assert all(one == other for one, other in numbers[split])
    assert sorted(sum(numbers.values(), [])) == [(number, number) for number in range(100)]
    assert [number for number, _ in numbers["test"]] == [19, 39, 59, 79, 99]
    words = [Dictionary.load(str(out / "bin" / f"dict.{lang}.txt")) for lang in ("fr", "cs")]
    assert words[0].symbols == words[1].symbols


def test_killed_and_called_again_it_makes_the_same(tmp_path):
    """With stand-ins for fairseq and Moses: killed within a step, the steps before it are kept, the rest is made."""
    raw = write(tmp_path / "raw", train=60, valid=5, test=5)
    stand_ins(tmp_path / "bin")
    learn = '[ "$1" != learn-bpe ] || { cat > /dev/null; echo 1; exit; }'
    slow = f"#!/bin/bash\n[ ! -e slow ] || sleep 30\n{learn}\nexec sed s/e/E/\n"
    for name in ("sacremoses", "subword-nmt"):
        (tmp_path / "bin" / name).write_text(slow)
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "PAGE_LINE": "", "PAGE_WITHIN": ""}
    environment["PAGE_RECORD"] = str(tmp_path / "record")
    start = lambda out: subprocess.Popen(  # noqa: E731
        ["/bin/bash", PREPARE, raw, out, "fr", "cs", "--workers", "2"],
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert start("whole").wait(60) == 0
    (tmp_path / "slow").touch()
    process = start("killed")
    while not (tmp_path / "killed" / "train.tok.fr.part").exists():
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert (tmp_path / "killed" / "train.cs").exists() and not (tmp_path / "killed" / "bin").exists()
    (tmp_path / "slow").unlink()
    assert start("killed").wait(60) == 0
    made = {path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*") if path.is_file()}
    assert made == {
        path.relative_to(tmp_path / "killed") for path in (tmp_path / "killed").rglob("*") if path.is_file()
    }
    assert all((tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes() for name in made)
    (raw / "train.fr").write_text((raw / "train.fr").read_text().replace("sentence 1:", "x"))
    (tmp_path / "killed" / "bin").rename(tmp_path / "bin2")
    process = start("killed")
    assert process.wait(60) == 1 and b"killed was begun with bpe=subword-nmt" in process.stderr.read()


@pytest.mark.parametrize(
    "spoil, arguments, message",
    (
        (lambda raw: (raw / "train.cs").unlink(), ["fr", "cs"], "train.cs is missing or empty"),
        (lambda raw: (raw / "valid.fr").unlink(), ["fr", "cs"], "valid.fr is missing or empty"),
        (lambda raw: (raw / "test.fr").write_bytes(b"\xff\n" * 5), ["fr", "cs"], "test.fr is not UTF-8 text"),
        (lambda raw: (raw / "test.fr").write_text("a\n"), ["fr", "cs"], "differ in their number of lines"),
        (lambda raw: [(raw / f"test.{name}").unlink() for name in ("fr", "cs")], ["fr", "cs"], "has 30 lines, too few"),
        (lambda raw: None, ["fr", "fr"], "SOURCE and TARGET are both fr"),
        (lambda raw: None, ["fr-CA", "cs"], "a language is letters and underscores, not 'fr-CA'"),
        (lambda raw: None, ["fr", "cs", "--merges", "0"], "take a positive number, not '0'"),
        (lambda raw: None, ["fr", "cs", "--bpe", "wordpiece"], "--bpe is subword-nmt or sentencepiece"),
    ),
)
def test_what_would_fail_later_is_refused_first(spoil, arguments, message, tmp_path):
    raw = write(tmp_path / "raw", train=30, valid=5, test=5)
    spoil(raw)
    done = bash(PREPARE, raw, tmp_path / "out", *arguments, check=False)
    assert done.returncode == 1 and message in done.stderr and not (tmp_path / "out").exists()


def test_training_is_of_the_languages_of_the_data(tmp_path):
    (tmp_path / "python3").write_text("#!/bin/sh\necho 0\n")
    (tmp_path / "fairseq-train").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    for name in ("python3", "fairseq-train"):
        (tmp_path / name).chmod(0o755)
    done = bash(EXAMPLE / "train.sh", tmp_path, "save", path=[tmp_path], check=False)
    assert done.returncode == 1 and "has no binarised train set of two languages" in done.stderr
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "dict.fr.txt").write_text("a 1\nb 1\n")
    for split in ("train", "valid"):
        for lang in ("fr", "cs"):
            (tmp_path / "bin" / f"{split}.fr-cs.{lang}.bin").write_text("1")
    (tmp_path / "train.clean.fr").write_text("a\n" * 7)
    done = bash(EXAMPLE / "train.sh", tmp_path, "save", "--max-update", "3", path=[tmp_path])
    words = done.stdout.split("\n")
    assert [words[words.index(f"--{side}-lang") + 1] for side in ("source", "target")] == ["fr", "cs"]
    assert words[-3:-1] == ["--max-update", "3"] and "--fp16" not in words
    assert "to do: fr-cs, 7 pairs, 2 subwords" in done.stderr
    (tmp_path / "bin" / "valid.fr-cs.cs.bin").unlink()
    done = bash(EXAMPLE / "train.sh", tmp_path, "save", path=[tmp_path], check=False)
    assert done.returncode == 1 and "valid.fr-cs.cs.bin is missing or empty" in done.stderr

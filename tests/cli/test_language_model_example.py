"""examples/language_model on small archives of the official layout: what is prepared, and errors."""

import hashlib
import random
import zipfile

import pytest
from fairseq.data import Dictionary, data_utils

from cli.wmt14 import ROOT, bash

PREPARE = ROOT / "examples" / "language_model" / "prepare.sh"
WIKI = " \n = Robert <unk> = \n \n Robert <unk> is an English film , television and theatre @-@ actor . \n"


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """wikitext-2-v1.zip, enwik8.zip, a damaged wikitext-103-v1.zip, and SHA256SUMS."""
    folder, rng = tmp_path_factory.mktemp("archives"), random.Random(1)
    with zipfile.ZipFile(folder / "wikitext-2-v1.zip", "w") as archive:
        for split in "train", "valid", "test":
            archive.writestr(f"wikitext-2/wiki.{split}.tokens", WIKI)
    text = "".join(rng.choice("abc \n\r\u2028é\xa0") for _ in range(1000)).encode()
    with zipfile.ZipFile(folder / "enwik8.zip", "w") as archive:
        archive.writestr("enwik8", text)
    (folder / "wikitext-103-v1.zip").write_bytes(b"not a zip file")
    sums = (f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in sorted(folder.glob("*.zip")))
    (folder / "SHA256SUMS").write_text("".join(sums))
    return folder, text


def binarised(out, split):
    """Every line of a binarised text as a list of symbols, the line end among them."""
    dictionary = Dictionary.load(str(out / "bin" / "dict.txt"))
    return [
        [dictionary[token] for token in line]
        for line in data_utils.load_indexed_dataset(str(out / "bin" / split), dictionary)
    ]


def test_wikitext(archives, tmp_path):
    out = tmp_path / "out"
    bash(
        PREPARE,
        "wikitext-2",
        tmp_path / "raw",
        out,
        "--workers",
        "1",
        "--mirror",
        f"file://{archives[0]}",
        "--checksums",
        archives[0] / "SHA256SUMS",
    )
    lines = [line.split() + ["</s>"] for line in WIKI.splitlines()]
    for split in "train", "valid", "test":
        assert (out / f"{split}.txt").read_text() == "".join(line.strip() + "\n" for line in WIKI.splitlines())
        assert binarised(out, split) == lines
    before = (out / "bin" / "train.bin").stat().st_mtime_ns
    again = bash(PREPARE, "wikitext-2", tmp_path / "raw", out, check=False)
    assert again.returncode == 1 and again.stderr.endswith("bin exists already; remove it or name another folder\n")
    assert (out / "bin" / "train.bin").stat().st_mtime_ns == before


def test_enwik8_is_read_as_bytes(archives, tmp_path):
    out, (folder, text) = tmp_path / "out", archives
    bash(PREPARE, "enwik8", folder, out, "--workers", "1", "--checksums", folder / "SHA256SUMS")
    size = len(text)
    for split, start, end in ("train", 0, 90), ("valid", 90, 95), ("test", 95, 100):
        part = text[size * start // 100 : size * end // 100]
        assert (out / f"{split}.txt").read_bytes() == part
        read = b"\n".join(bytes(map(int, line[:-1])) for line in binarised(out, split))
        assert read == part.removesuffix(b"\n")
        assert all(line[-1] == "</s>" for line in binarised(out, split))


def test_own_text_in_pieces(tmp_path):
    raw, out, rng = tmp_path / "raw", tmp_path / "out", random.Random(1)
    raw.mkdir()
    for split in "train", "valid", "test":
        words = ("".join(rng.choice("abcdefgh") for _ in range(rng.randint(1, 9))) for _ in range(2000))
        lines = " ".join(words).replace(" a", "\n").splitlines()
        (raw / f"{split}.txt").write_text("\n".join([*lines, "", "ünknown ☃"]) + "\n")
    bash(PREPARE, "text", raw, out, "--sentencepiece", "300", "--workers", "2")
    for split in "train", "valid", "test":
        assert (out / f"{split}.txt").read_text() == (raw / f"{split}.txt").read_text()
        pieces = ["".join(line[:-1]).replace("▁", " ").strip() for line in binarised(out, split)]
        assert pieces[:-1] == [" ".join(line.split()) for line in (raw / f"{split}.txt").read_text().splitlines()][:-1]
        assert not any("<unk>" in line for line in binarised(out, split))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["wikitext-3", "raw", "out"], "DATASET is wikitext-2, wikitext-103, enwik8 or text, not 'wikitext-3'"),
        (["enwik8", "raw", "out", "--sentencepiece", "100"], "the tokens of enwik8 are its bytes: no --sentencepiece"),
        (["text", "raw", "out"], "raw/train.txt is missing or empty"),
        (["text", "latin1", "out"], "latin1/train.txt is not UTF-8 text"),
        (["enwik8", "raw", "out", "--mirror", "file:///absent"], "cannot download file:///absent/enwik8.zip"),
        (["enwik8", "archives", "out"], "archives/enwik8.zip is damaged or another version"),
        (
            ["wikitext-103", "archives", "out", "--checksums", "archives/SHA256SUMS"],
            "archives/wikitext-103-v1.zip: File is not a zip file",
        ),
        (["enwik8", "raw", "out", "--threshold", "few"], "--sentencepiece and --threshold take a number, not 'few'"),
    ],
)
def test_errors(arguments, message, archives, tmp_path):
    (tmp_path / "archives").symlink_to(archives[0])
    (tmp_path / "latin1").mkdir()
    for split in "train", "valid", "test":
        (tmp_path / "latin1" / f"{split}.txt").write_bytes("é\n".encode("latin-1"))
    done = bash(PREPARE, *arguments, check=False, cwd=tmp_path)
    assert done.returncode == 1
    assert [line for line in done.stderr.splitlines() if line.startswith("prepare: ") and message in line], done.stderr
    assert not (tmp_path / "out" / "bin").exists()


def test_usage():
    done = bash(PREPARE, "wikitext-2", check=False)
    assert done.returncode == 2 and "usage: bash prepare.sh DATASET RAW OUT" in done.stderr

"""Tiny archives of the layout of WMT14 English-German, and the scripts of examples/translation run as a user does."""

import hashlib
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

from cli import commands

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "translation"
CORPORA = {
    "europarl-v7.tgz": "training/europarl-v7.de-en",
    "commoncrawl.tgz": "commoncrawl.de-en",
    "nc-v11.tgz": "training-parallel-nc-v11/news-commentary-v11.de-en",
}
TESTSETS = {
    "newstest2010": ("test/newstest2010-src.en.sgm", "test/newstest2010-src.de.sgm"),
    "newstest2011": ("newstest2011-src.en.sgm", "newstest2011-src.de.sgm"),
    "newstest2012": ("test/newstest2012-src.en.sgm", "test/newstest2012-src.de.sgm"),
    "newstest2013": ("test/newstest2013-src.en.sgm", "test/newstest2013-src.de.sgm"),
    "newstest2014": ("test-full/newstest2014-deen-src.en.sgm", "test-full/newstest2014-deen-ref.de.sgm"),
    "newstest2015": ("test/newstest2015-ende-src.en.sgm", "test/newstest2015-ende-ref.de.sgm"),
    "newstest2016": ("test/newstest2016-ende-src.en.sgm", "test/newstest2016-ende-ref.de.sgm"),
}
PAIRS = 90  # of each corpus
SENTENCES = 16  # of each test set; fairseq makes no batch at all of a handful of sentences


def bash(script, *args, path=(), check=True, **kwargs):
    """Runs a script of the example as a user does whose PATH starts with this interpreter's folder, or that of the
    commands of it that are forked (:mod:`cli.commands`)."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.update(commands.stubs(environment))
    folders = [*map(str, path), commands.stub_folder(), str(Path(sys.executable).parent), os.environ["PATH"]]
    environment["PATH"] = os.pathsep.join(folders)
    done = subprocess.run(
        ["bash", str(script), *map(str, args)], env=environment, capture_output=True, text=True, timeout=600, **kwargs
    )
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def sentences(lang, first, count):
    word, dog = {"en": ("sentence", "a well-known dog's house"), "de": ("Satz", "ein Haus-Hund namens Müller")}[lang]
    return [f"{word} {number}: {dog} ({number % 7})." for number in range(first, first + count)]


def write_archive(path, members):
    with tarfile.open(path, "w:gz") as archive:
        for name, text in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            archive.addfile(info, io.BytesIO(text.encode()))


def tiny_archives(folder):
    """The ten archives. Common Crawl's pairs 10, 11 and 12 have line ends of other systems, 20 and 21 must go."""
    for index, (name, prefix) in enumerate(CORPORA.items()):
        text = {lang: sentences(lang, PAIRS * index, PAIRS) for lang in ("en", "de")}
        if index == 1:
            text["en"][10] += "\rfrom a Mac\x0b"
            text["de"][10] += " von einem Mac"
            text["en"][11] += " split and more"
            text["de"][11] += "\u2028getrennt\u0085und mehr"
            text["en"][12] += "\r"
            text["en"][20] = ""
            text["de"][21] *= 9
        members = {f"{prefix}.{lang}": "".join(line + "\n" for line in lines) for lang, lines in text.items()}
        write_archive(folder / name, members)
    for name, members in TESTSETS.items():
        first = SENTENCES * int(name[-4:])
        write_archive(
            folder / f"{name}.tgz",
            {
                member: '<srcset setid="x">\n<doc docid="d">\n'
                + "".join(f'<seg id="{i}">{line}</seg>\r\n' for i, line in enumerate(sentences(lang, first, SENTENCES)))
                for lang, member in zip(("en", "de"), members)
            },
        )


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()

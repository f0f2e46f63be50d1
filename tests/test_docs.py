"""The code of the pages runs as it stands."""

import re
from pathlib import Path

import pytest

from cli.helpers import USER_DIR

PAGES = ("plain-torch",)
BLOCKS = [
    pytest.param(block, id=f"{page}-{number}")
    for page in PAGES
    for number, block in enumerate(
        re.findall(
            r"^```python\n(.*?)^```$",
            Path(USER_DIR).parent.joinpath("docs", f"{page}.md").read_text(encoding="utf-8"),
            re.DOTALL | re.MULTILINE,
        )
    )
]


@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_runs(block):
    if "import BertLayer" in block:
        pytest.importorskip("transformers")
        assert len(block.splitlines()) <= 15
    exec(compile(block, "block", "exec"), {"__name__": "block"})


def test_there_are_blocks():
    assert len(BLOCKS) == 3


def test_what_is_checked_names_tests_that_are_there():
    root = Path(USER_DIR).parent
    named = re.findall(r"`(tests/[^`]+)`", root.joinpath("docs", "what-is-checked.md").read_text(encoding="utf-8"))
    assert len(named) > 30
    assert [name for name in named if not root.joinpath(name).exists()] == []

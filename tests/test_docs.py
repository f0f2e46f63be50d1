"""The code of the pages runs as it stands, and the reference in Python has what is public."""

import ast
import re
from pathlib import Path

import pytest
import torch

from pages import PAGES, ROOT, name_of, python_blocks, run_python

# where the blocks of a page run, and how many there are
PYTHON = {
    "README.md": ("tests/test_docs.py and tests/test_classifier.py", 2),
    "docs/plain-torch.md": ("tests/test_docs.py", 3),
    "docs/pictures.md": ("tests/test_docs.py", 1),
    "docs/hub.md": ("tests/test_classifier.py", 1),
    "docs/zoo.md": ("tests/hub/test_zoo.py", 1),
    "docs/add-a-mechanism.md": ("tests/cli/test_add_a_mechanism.py", 1),
    "examples/adatape/README.md": ("tests/test_classifier.py", 1),
    "examples/classification/README.md": ("tests/test_classifier.py", 1),
    "examples/question_answering/README.md": ("tests/test_reader.py", 1),
}
PLAIN_TORCH = python_blocks(ROOT / "docs/plain-torch.md")


def test_every_block_of_python_runs_somewhere():
    found = {name_of(page): len(python_blocks(page)) for page in PAGES if python_blocks(page)}
    assert found == {page: count for page, (_, count) in PYTHON.items()}
    for page, (tests, _) in PYTHON.items():
        for test in tests.split(" and "):
            text = ROOT.joinpath(test).read_text(encoding="utf-8")
            assert f'"{page}"' in text or "add_a_mechanism" in test, page


@pytest.mark.parametrize("block", PLAIN_TORCH, ids=range(len(PLAIN_TORCH)))
def test_a_block_runs(block):
    if "import BertLayer" in block:
        pytest.importorskip("transformers")
        assert len(block.splitlines()) <= 15
    exec(compile(block, "docs/plain-torch.md", "exec"), {"__name__": "block"})


def test_blocks_that_need_no_model(capsys):
    x, padding = torch.randn(2, 3, 512), torch.zeros(2, 3).bool()
    found = run_python("README.md", "ParameterSharedTransformerEncoder", x=x, padding=padding)
    assert found["y"].shape == (2, 3, 512)
    found = run_python("docs/pictures.md", "to_fragment")
    assert (
        "film" in capsys.readouterr().out and found["page"].startswith("<!DOCTYPE html>") and "film" in found["piece"]
    )


def test_the_reference_has_what_is_public():
    said = "\n".join(path.read_text() for path in ROOT.glob("docs/api/*.md"))
    named = re.findall(r"^::: fairseq_adaptive\.(\S+)$", said, re.MULTILINE)
    assert len(set(named)) == len(named) > 80
    for room in ("modules/policies", "modules/stack", "modules"):
        (names,) = [
            ast.literal_eval(each.value)
            for each in ast.parse((ROOT / "fairseq_adaptive" / room / "__init__.py").read_text()).body
            if isinstance(each, ast.Assign) and each.targets[0].id == "__all__"
        ]
        assert {name for name in names if name != "STRATEGIES"} <= {each.rpartition(".")[2] for each in named}
    where = ast.parse((ROOT / "fairseq_adaptive" / "hub" / "__init__.py").read_text())
    (found,) = [each.value for each in where.body if isinstance(each, ast.Assign) and each.targets[0].id == "_WHERE"]
    assert {f"{place}.{name}" for name, place in ast.literal_eval(found).items()} <= set(named)


def test_what_is_checked_names_tests_that_are_there():
    text = ROOT.joinpath("docs", "what-is-checked.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[^`]+)`", text)
    assert len(named) > 30
    assert [name for name in named if not Path(ROOT, name).exists()] == []

"""Imports point one way: what is above knows what lies below, and never the other way round."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "fairseq_adaptive"
# each room may import those in lines below its own, and NEIGHBOURS
LEVELS = (
    "commands",
    "explore",
    "hub",
    "report",
    "interop",
    "models criterions tasks optim",
    "decoding data",
    "modules",
    "ops",
    "ranges files progress",
    "errors",
    "printable",
)
LEVEL = {room: number for number, line in enumerate(LEVELS) for room in line.split()}
NEIGHBOURS = {("criterions", "models")}


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fairseq_adaptive."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.ImportFrom) and node.module == "fairseq_adaptive":
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.Import):
            yield from (each.name.split(".")[1] for each in node.names if each.name.startswith("fairseq_adaptive."))


@pytest.mark.parametrize("room", LEVEL)
def test_no_room_imports_one_above_it(room):
    files = [ROOT / f"{room}.py"] if (ROOT / f"{room}.py").exists() else sorted((ROOT / room).rglob("*.py"))
    assert files
    wrong = [
        f"{path.relative_to(ROOT)} imports {other}"
        for path in files
        for other in imports_of(path)
        if other in LEVEL and other != room and LEVEL[other] <= LEVEL[room] and (room, other) not in NEIGHBOURS
    ]
    assert not wrong

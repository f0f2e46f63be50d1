"""A file under its final name is whole: whoever writes one does so beside it, and renames it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [
    path
    for folder in ("fairseq_adaptive", "scripts", "examples")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if "compat" not in path.parts and path.name != "files.py"
]
SAFE = ("whole_file", "whole_folder", "TemporaryDirectory")
# write into a folder that they are given, which is not yet under its name; or write what is no file
GIVEN = {
    "families.py",
    "checkpoint.py",
    "albert_tokenizer.py",
    "adaptive_softmax.py",
    "prepare_corpus.py",
    "apply_sentencepiece.py",
    "scaling_point.py",  # makes its data in a folder that scaling.py renames
    "zoo.py",  # copies and unpacks into a folder that whole_folder or TemporaryDirectory has made
    "packing.py",  # writes the archive to what whole_file names
    "measure.py",  # a log of what a record's commands say
    "timing.py",  # asks Linux to measure memory anew
}


def _writes(call):
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    if name == "open":
        modes = [
            each.value
            for each in [*call.args[1:2], *(k.value for k in call.keywords if k.arg == "mode")]
            if isinstance(each, ast.Constant)
        ]
        return any(set(str(mode)) & set("wxa") for mode in modes)
    return name in ("write_text", "write_bytes", "savefig", "savez", "copyfile") or (
        name == "save"
        and getattr(call.func, "value", None) is not None
        and getattr(call.func.value, "id", "") in ("torch", "np", "numpy")
    )


def unsafe(tree):
    """Line numbers of what is written under its final name."""
    found = []

    def visit(node, safe):
        if isinstance(node, ast.With):
            text = " ".join(ast.unparse(item.context_expr) for item in node.items)
            safe = safe or any(name in text for name in SAFE)
        if isinstance(node, ast.Call) and _writes(node) and not safe:
            found.append(node.lineno)
        for child in ast.iter_child_nodes(node):
            visit(child, safe)

    visit(tree, False)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_python_writes_beside_and_renames(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if path.name == "encode.py":  # its stack of contexts holds whole_file
        assert "stack.enter_context(whole_file(" in path.read_text(encoding="utf-8")
    elif path.name not in GIVEN:
        assert not unsafe(tree)


def test_an_unsafe_writer_is_found():
    for code in (
        'open("a", "w")',
        'open("a", mode="x")',
        'Path("a").write_text("b")',
        'figure.savefig("a")',
        'np.savez("a", b=1)',
        'torch.save(1, "a")',
    ):
        assert unsafe(ast.parse(code)) == [1]
        assert not unsafe(ast.parse(f'with whole_file("a") as part:\n    {code}'))

import ast
import importlib
import pathlib

import fairseq
import pytest
from fairseq import utils

from fairseq_adaptive.compat.literals import NotLiteral, read_literal


@pytest.mark.parametrize(
    "expression",
    [
        "[(512, 3)] * 20",
        "[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512,2,2)] * 2",
        "2 * [1]",
        "(0.9, 1 - 0.02)",
        "0.9,0.98",
        "True",
        "[True, False]",
        "None",
        "1e-3 / 2",
        "-1",
        "+2",
        "7 // 2",
        "{'a': [1, 'b']}",
        "'moses'",
        " 3 ",
        "[]",
        "()",
        "[(1, 64), (2, 128)]",
        "[1] * 0",
        "[1] * -1",
        "3 - 2 * 4",
    ],
)
def test_values_are_those_of_python(expression):
    value, expected = read_literal(expression), eval(expression)
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').system('touch PWNED')",
        "[__import__('os')]",
        "open('f')",
        "x",
        "true",
        "(1).real",
        "[1][0]",
        "2**9",
        "f'{1}'",
        "lambda: 1",
        "[x for x in (1,)]",
        "1 if 2 else 3",
        "not 1",
        "1 < 2",
        "[0] * 10**9",
        "[0] * 9999999",
        "[[0] * 9999] * 9999 + [0] * 9999",
        "'a' * 9",
        "'a' + 'b'",
        "{**{}}",
        "{1, 2}",
        "...",
        "1; 2",
        "",
        "1 / 0",
        "(" * 300,
        "-" * 3999 + "1",
        "1 +" * 2000 + "1",
        "[(1, 2)",
        "1\n2",
        "(x := 1)",
        "*[1]",
        "\0",
        "[1] * 1.5",
        "-[1]",
    ],
)
def test_what_is_no_literal_is_refused(expression):
    with pytest.raises(NotLiteral, match="is no value of a flag, it is read as a literal and never evaluated"):
        read_literal(expression)


def test_what_is_no_string_raises_what_eval_raises():
    with pytest.raises(TypeError):
        read_literal(3)
    assert utils.eval_bool(3) is False and utils.eval_bool("True") is True  # relies on it


def test_fairseq_reads_its_own_values():
    assert utils.eval_str_list("0.1,0.2") == [0.1, 0.2] and utils.eval_str_list("5", int) == [5]
    assert utils.eval_str_dict("{'a': 1}") == {"a": 1}


def evaluating_modules():
    root = pathlib.Path(fairseq.__file__).parent
    for path in root.rglob("*.py"):
        name = path.relative_to(root)
        if name.parts[0] == "examples":  # which --user-dir alone imports
            continue
        calls = [
            node
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec")
        ]
        if calls:
            yield ".".join(("fairseq", *name.with_suffix("").parts)), calls


def test_no_module_of_fairseq_evaluates():
    """Found in the source, so that what another version of fairseq evaluates is found, too."""
    modules = dict(evaluating_modules())
    assert {"fairseq.utils", "fairseq.models.fconv", "fairseq.models.transformer_lm"} < set(modules)
    for name, calls in modules.items():
        assert all(call.func.id == "eval" for call in calls), name
        assert vars(importlib.import_module(name)).get("eval") is read_literal, name
    print(f"{sum(map(len, modules.values()))} calls in {len(modules)} modules")

"""A patch of fairseq's flags that are Python expressions: they are read as literals, never evaluated."""

import ast
import operator
import sys

from fairseq_adaptive.errors import UsageError

LONGEST_EXPRESSION = 4000  # characters; fairseq's longest default has 60
LONGEST_SEQUENCE = 10_000  # items that * and + may make
_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}


class NotLiteral(UsageError):
    """A flag that must be a literal is something else.

    Attributes:
        expression: the value of the flag
    """

    wanted = (
        "it is read as a literal and never evaluated: numbers, strings, True, False, None, lists, tuples and "
        "dicts of these, with + - * /, such as [(512, 3)] * 20"
    )

    def __init__(self, expression: str):
        self.expression = expression
        super().__init__(f"{shorten(expression)} is no value of a flag, {self.wanted}")


def shorten(value, width: int = 100) -> str:
    """``repr`` of a value, in one line of at most ``width`` characters, which may come from a hostile file."""
    text = repr(value)
    return text if len(text) <= width else f"{text[: width - 4]} ..."


def read_literal(expression: str):
    """The value of a literal, with arithmetic: ``"[(512, 3)] * 2 + [(256, 1)]"``.

    Stands for ``eval`` in fairseq's modules, for all that fairseq gives to it. Names, calls, attributes, powers and
    comprehensions are refused, so that nothing runs and what is made stays as small as what is written, or has at most
    10,000 items.

    Raises:
        NotLiteral: when it is none
        TypeError: when it is no string, as ``eval`` does (``fairseq.utils.eval_bool`` counts on it)
    """
    if not isinstance(expression, str):
        raise TypeError(f"a flag is read from a string, not from {type(expression).__name__}")
    try:
        if len(expression) > LONGEST_EXPRESSION:
            raise ValueError
        return _value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ValueError, TypeError, ArithmeticError, RecursionError, MemoryError):
        raise NotLiteral(expression) from None


def _value(node):
    if isinstance(node, ast.Constant) and node.value is not Ellipsis:
        return node.value
    if isinstance(node, ast.List):
        return [_value(each) for each in node.elts]
    if isinstance(node, ast.Tuple):
        return tuple(_value(each) for each in node.elts)
    if isinstance(node, ast.Dict):  # a key of None is **another
        return {_value(key): _value(value) for key, value in zip(node.keys, node.values)}
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_number(_value(node.operand)))
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _combine(type(node.op), _value(node.left), _value(node.right))
    raise ValueError


def _number(value):
    if not isinstance(value, (int, float, complex)):
        raise ValueError
    return value


def _combine(kind, left, right):
    if kind is ast.Mult and isinstance(right, (list, tuple)):
        left, right = right, left
    if isinstance(left, (list, tuple)) and kind in (ast.Add, ast.Mult):
        length = len(left) + len(right) if kind is ast.Add else len(left) * max(_number(right), 0)
        if length > LONGEST_SEQUENCE:
            raise ValueError
    else:
        _number(left), _number(right)
    return _OPERATORS[kind](left, right)


def read_literals():
    """What a flag or a checkpoint says is never run as code.

    fairseq calls ``eval`` on flags that are lists (``--adaptive-softmax-cutoff``, ``--encoder-layers`` of a
    convolutional model, ``--adam-betas``), and models are built from the flags in a checkpoint. Every module of fairseq
    finds :func:`read_literal` under that name.
    """
    for name, module in list(sys.modules.items()):
        if name.startswith("fairseq.") and module is not None:
            module.eval = read_literal

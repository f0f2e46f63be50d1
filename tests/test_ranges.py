"""Every number that a user can give has a range, and what is outside of it is refused in one line before work starts."""

import argparse
import ast
import copy
import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.models import ARCH_CONFIG_REGISTRY, MODEL_REGISTRY
from fairseq.registry import REGISTRIES
from fairseq.tasks import TASK_REGISTRY
from omegaconf import OmegaConf

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules.transformer_xl.layout import parse_layout
from fairseq_adaptive.ranges import Parser, Range, check_ranges, ranges_of

ROOT = Path(__file__).resolve().parents[1]


def _config(owner):
    return getattr(owner, "__dataclass", None)


def _numbers(owner):
    """Names of the flags of a registered class that take a number."""
    parser = argparse.ArgumentParser()
    if _config(owner) is not None:
        gen_parser_from_dataclass(parser, _config(owner)())
        fields = dataclasses.fields(_config(owner))
        more = {field.name for field in fields if field.type in (int, float)}
        # of other parts of the configuration, which declare it
        theirs = {
            field.name for field in fields if str(field.default).startswith("${") and "help" not in field.metadata
        }
    else:
        more, theirs = set(), set()
        if hasattr(owner, "add_args"):
            owner.add_args(parser)
    numeric = [
        action.dest for action in parser._actions if action.type in (int, float) or isinstance(action.type, Range)
    ]
    return sorted({*numeric, *more} - theirs)


def _ours():
    registries = {"model": MODEL_REGISTRY, "task": TASK_REGISTRY}
    registries.update({name: REGISTRIES[name]["registry"] for name in ("criterion", "optimizer")})
    for kind, registry in registries.items():
        for name, owner in registry.items():
            if owner.__module__.startswith("fairseq_adaptive."):
                yield kind, name, owner


FLAGS = [(kind, name, flag) for kind, name, owner in _ours() for flag in _numbers(owner)]
OWNERS = {(kind, name): owner for kind, name, owner in _ours()}


def outside(within):
    """Numbers that are not in a range."""
    step = 1 if within.kind is int else max(1e-3, 1e-3 * abs(within.most))
    below = within.least if within.above else within.least - step
    above = within.most if within.below else within.most + step
    return [math.nan, math.inf, -math.inf, within.kind(below), within.kind(above)]


def test_there_are_flags():
    assert len(FLAGS) > 180
    assert {kind for kind, _, _ in FLAGS} == {"model", "task", "criterion", "optimizer"}


@pytest.mark.parametrize("kind, name, flag", FLAGS)
def test_flag_has_a_range_which_checks_and_explains_it(kind, name, flag):
    owner = OWNERS[kind, name]
    within = ranges_of(owner)[flag]
    assert math.isfinite(within.least) and math.isfinite(within.most)
    shown = "--" + flag.replace("_", "-")
    for value in outside(within):
        with pytest.raises(UsageError, match=f"^{shown} is .*: use a (whole )?number"):
            check_ranges({flag: value}, owner)
    config = _config(owner)
    if config is not None:
        (field,) = (each for each in dataclasses.fields(config) if each.name == flag)
        if field.default is not None and not str(field.default).startswith("${"):
            check_ranges({flag: field.default}, owner)
        if "range" in field.metadata:
            assert f"[{within}]" in field.metadata["help"]
        return
    parser = argparse.ArgumentParser()
    owner.add_args(parser)
    (action,) = (each for each in parser._actions if each.dest == flag)
    assert f"[{within}]" in action.help
    for value in outside(within):
        with pytest.raises(SystemExit):
            parser.parse_args([f"{shown}={value}"])


def _build(kind, owner, task, dictionary, flags):
    config = _config(owner)
    defaults = (
        {}
        if config is None
        else {
            field.name: field.default
            for field in dataclasses.fields(config)
            if field.default is not dataclasses.MISSING and not str(field.default).startswith("${")
        }
    )
    args = argparse.Namespace(**{**defaults, "data": "nowhere", "temperature_updates": 10, **flags})
    if kind == "model":
        task.cfg, task.image_size, task.channels, task.classes = SimpleNamespace(sequence_length=8), (16, 16), 1, "ab"
        return owner.build_model(args, task)
    if kind == "task":
        return (
            owner.setup_task(args)
            if owner.__name__.startswith(("Parity", "Image", "Segmented"))
            else owner(args, dictionary)
        )
    if kind == "optimizer":
        parameter = SimpleNamespace(param_group="architecture")
        return owner(args, [parameter])
    task.state = SimpleNamespace(add_factory=lambda *_: None)
    return owner.build_criterion(OmegaConf.create({**vars(args), "sentence_avg": False}), task)


@pytest.mark.parametrize("kind, name, flag", FLAGS)
def test_what_is_built_without_the_parser_is_checked(kind, name, flag, task, dictionary):
    """fairseq-hydra-train and checkpoints do not pass the parser."""
    owner = OWNERS[kind, name]
    within, dictionary = ranges_of(owner)[flag], copy.deepcopy(dictionary)  # tasks add to it
    task = type(task)(dictionary)
    for value in (math.nan, outside(within)[4]):
        with pytest.raises(UsageError, match=f"^--{flag.replace('_', '-')} is "):
            _build(kind, owner, task, dictionary, {flag: value})


@pytest.mark.parametrize(
    "arch",
    [name for name, configure in ARCH_CONFIG_REGISTRY.items() if configure.__module__.startswith("fairseq_adaptive.")],
)
def test_presets_are_in_range(arch):
    from fairseq.models import ARCH_MODEL_REGISTRY

    args = argparse.Namespace()
    ARCH_CONFIG_REGISTRY[arch](args)
    assert vars(args)
    check_ranges(args, ARCH_MODEL_REGISTRY[arch])


def test_no_flag_of_a_script_is_without_a_range():
    found = []
    alone = {"apply_sentencepiece.py"}  # imports nothing of ours, and checks its only number itself
    folders = (ROOT / name for name in ("fairseq_adaptive", "scripts", "examples"))
    for path in (each for folder in folders for each in folder.rglob("*.py")):
        if path.name in alone:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
                types = [each.value for each in node.keywords if each.arg == "type"]
                if any(isinstance(each, ast.Name) and each.id in ("int", "float") for each in types):
                    found.append(f"{path}:{node.lineno}")
    assert not found


@pytest.mark.parametrize(
    "within, inside, wrong",
    (
        (Range(int, 1, 10), ("1", "10", " 7 "), ("0", "11", "1.5", "nan", "inf", "", "x", "9" * 5000)),
        (Range(float, 0, 1), ("0", "1", "1e-3"), ("-1e-9", "1.0001", "nan", "-nan", "inf", "-inf", "", "1e999")),
        (Range(float, 0, 1, above=True), ("1", "1e-300"), ("0", "-0.0", "nan")),
        (Range(float, 0, 1, below=True), ("0", "0.999"), ("1", "nan")),
    ),
)
def test_range_of_texts(within, inside, wrong, capsys):
    parser = Parser(prog="x")
    parser.add_argument("--number", type=within, help="of things")
    for text in inside:
        assert parser.parse_args([f"--number={text}"]).number == within.kind(text)
    for text in wrong:
        with pytest.raises(SystemExit):
            parser.parse_args([f"--number={text}"])
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("x: error: argument --number: ") and last.endswith(str(within)) and len(last) < 200
    assert f"of things [{within}]" in " ".join(parser.format_help().split())


@pytest.mark.parametrize("value", (True, "3", None, [3], {"a": 3}, 2.5, math.nan))
def test_what_a_file_has_in_place_of_a_number_is_refused(value):
    with pytest.raises(UsageError, match="^layers is .*: use a whole number from 1 to 10"):
        Range(int, 1, 10).check(value, "layers")


@pytest.mark.parametrize("layout", ("f*100000000", "f*999999999999999999999", "a*2000,f", "af*1001", "f*" + "9" * 5000))
def test_layouts_have_an_end(layout):
    with pytest.raises(UsageError, match="at most 2000 blocks"):
        parse_layout(layout)


def test_longest_layout():
    assert parse_layout("af*1000") == "af" * 1000
    assert parse_layout("f*0000003") == "fff"

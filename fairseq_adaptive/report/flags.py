"""The flags of what this package registers with fairseq, whose own ``--help`` shows none of an architecture's."""

import argparse
import textwrap
from typing import Iterator, List, NamedTuple, Optional, Tuple

from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_NAME_REGISTRY, MODEL_REGISTRY
from fairseq.registry import REGISTRIES
from fairseq.tasks import TASK_REGISTRY
from omegaconf import MISSING

import fairseq_adaptive.plugin  # noqa: F401  registers models, tasks, criterions and optimizers
from fairseq_adaptive.ranges import Range, ranges_of


class Flag(NamedTuple):
    """A flag of a registered class.

    Args:
        name: ``--encoder-layers``, or that of a positional argument
        dest: ``encoder_layers``
        takes: ``switch``, ``{one,of,some}``, or a type with its range
        default: None where there is none
        help: one paragraph, without the range; may be empty
        stock: whether the class of fairseq that the registered one is made of has it, too
    """

    name: str
    dest: str
    takes: str
    default: object
    help: str
    stock: bool


def ours() -> Iterator[Tuple[str, str, type]]:
    """What this package registers: kind (model, task, criterion, optimizer), name and class."""
    registries = {"model": MODEL_REGISTRY, "task": TASK_REGISTRY}
    registries.update({name: REGISTRIES[name]["registry"] for name in ("criterion", "optimizer")})
    for kind, registry in registries.items():
        for name, owner in sorted(registry.items()):
            if owner.__module__.startswith("fairseq_adaptive."):
                yield kind, name, owner


def presets() -> List[str]:
    """Names of the architectures that this package registers for models, also those called as their model."""
    return sorted(name for name, say in ARCH_CONFIG_REGISTRY.items() if say.__module__.startswith("fairseq_adaptive."))


def stock_class(owner: type) -> type:
    """The class of fairseq that a registered class is made of."""
    return next(each for each in owner.__mro__ if each.__module__.startswith("fairseq."))


def _actions(owner, **options):
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, **options)
    config = getattr(owner, "__dataclass", None)
    if config is not None:
        gen_parser_from_dataclass(parser, config())
    else:
        owner.add_args(parser)
    return sorted(parser._actions, key=lambda each: each.dest)


def _takes(action, within):
    if action.nargs == 0:
        return "switch"
    if action.choices:
        return "{" + ",".join(map(str, action.choices)) + "}"
    kind = getattr(action.type, "__name__", "str")
    return f"{kind} {within}" if within is not None else kind.replace("<lambda>", "list")


def _help(action, within: Optional[Range]):
    text = (action.help or "").replace("%%", "%").replace("%(default)s", str(action.default))
    return " ".join(text.replace(f"[{within}]", "").split())


def flags_of(owner: type, preset: Optional[str] = None) -> List[Flag]:
    """The flags of a registered class, by name.

    Args:
        owner: the class
        preset: an architecture, whose defaults count (default: those that the class itself declares)
    """
    ranges = ranges_of(owner)
    stock = {each.dest for each in _actions(stock_class(owner))}
    said = preset_values(owner, preset) if preset else {}
    return [
        Flag(
            each.option_strings[0] if each.option_strings else each.dest,
            each.dest,
            _takes(each, ranges.get(each.dest)),
            said.get(each.dest, each.default),
            _help(each, ranges.get(each.dest)),
            each.dest in stock,
        )
        for each in _actions(owner)
    ]


def preset_values(owner: type, preset: str) -> dict:
    """What an architecture makes of no flags at all: defaults that the class declares, and those that it says itself."""
    args = argparse.Namespace()
    ARCH_CONFIG_REGISTRY[preset](args)
    return vars(args)


def preset_says(name: str) -> dict:
    """What an architecture says of flags, without what it shares with its model."""
    found = []
    for each in (name, ARCH_MODEL_NAME_REGISTRY[name]):
        args = argparse.Namespace()
        ARCH_CONFIG_REGISTRY[each](args)
        found.append(vars(args))
    own, common = found
    return own if name == ARCH_MODEL_NAME_REGISTRY[name] else {k: v for k, v in own.items() if common.get(k, own) != v}


def known() -> List[Tuple[str, str, type, Optional[str]]]:
    """Kind, name, class and preset of all that :func:`describe` knows, architectures first; a name may be of two kinds."""
    found = []
    for kind, name, owner in ours():
        if kind != "model":
            found.append((kind, name, owner, None))
        elif name not in presets():
            found.append(("architecture", name, owner, None))
    models = dict((name, owner) for kind, name, owner in ours() if kind == "model")
    found += [("architecture", name, models[ARCH_MODEL_NAME_REGISTRY[name]], name) for name in presets()]
    return sorted(found, key=lambda each: each[:2])


def shown(default) -> str:
    """A default as a user reads it."""
    if default is None or default is argparse.SUPPRESS or default == "":
        return "none"
    if default == MISSING:
        return "none, to be given"
    if isinstance(default, bool):
        return "on" if default else "off"
    return str(default)


def describe(kind: str, name: str, owner: type, preset: Optional[str], stock: bool = False) -> str:
    """The flags of an entry of :func:`known` as text.

    Args:
        stock: also those that it has from fairseq
    """
    flags, base = flags_of(owner, preset), stock_class(owner).__name__
    model = ARCH_MODEL_NAME_REGISTRY.get(name, name) if kind == "architecture" else name
    lines = [f"{kind} {name}" + (f", of model {model}" if model != name else "")]
    for each in flags:
        if stock or not each.stock:
            lines.append(f"  {each.name}  {each.takes}, default {shown(each.default)}")
            lines += textwrap.wrap(each.help, 110, initial_indent="      ", subsequent_indent="      ")
    others = sum(each.stock for each in flags)
    if others and not stock:
        lines.append(f"  and {others} flags of fairseq's {base}: --all shows them, with the defaults here")
    return "\n".join(lines if flags else [*lines, "  no flags"])


def _cell(text):
    for each in "\\|*<[":
        text = text.replace(each, f"\\{each}" if each != "<" else "&lt;")
    return text


_TITLES = {"model": "Architectures", "criterion": "Criterions", "task": "Tasks", "optimizer": "Optimizers"}


def markdown() -> str:
    """The page of all flags, docs/flags.md."""
    lines = [
        "# Flags",
        "",
        "Made by `fairseq-adaptive flags --markdown`. `fairseq-adaptive flags NAME` prints those of an architecture, criterion,",
        "task or optimizer, with the defaults of that architecture; `--all` adds those that it has from fairseq.",
    ]
    entries = list(ours())
    for kind, title in _TITLES.items():
        lines += ["", f"## {title}"]
        for name, owner in [(name, owner) for each, name, owner in entries if each == kind]:
            flags = flags_of(owner, name if name in presets() else None)
            own = [each for each in flags if not each.stock]
            lines += ["", f"### {name}" + (f" ({kind})" if sum(each[1] == name for each in entries) > 1 else ""), ""]
            others = [f"`{each}`" for each in presets() if ARCH_MODEL_NAME_REGISTRY[each] == name != each]
            if kind == "model" and others:
                lines += textwrap.wrap(f"Other architectures of it: {', '.join(others)}.", 120, break_on_hyphens=False)
                lines.append("")
            if len(own) < len(flags):
                beside = "Beside the flags" if own else "The flags"
                lines += [f"{beside} of fairseq's `{stock_class(owner).__name__}`{':' if own else '.'}", ""]
            if own:
                lines += ["| flag | takes | default | what it does |", "|---|---|---|---|"]
            lines += [
                f"| `{each.name}` | {_cell(each.takes)} | {_cell(shown(each.default))} | {_cell(each.help)} |"
                for each in own
            ]
            if not flags:
                lines.append("No flags.")
            while not lines[-1]:
                lines.pop()
    return "\n".join(lines) + "\n"

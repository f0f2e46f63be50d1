"""All flags of what this package registers, as text: ``python tests/frozen_flags.py`` writes them to frozen_flags.txt.

A new flag, another default or another range is a decision: run that, and let the difference be seen in the commit.
"""

import argparse
from pathlib import Path

from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_NAME_REGISTRY, MODEL_REGISTRY
from fairseq.registry import REGISTRIES
from fairseq.tasks import TASK_REGISTRY

import fairseq_adaptive.plugin  # noqa: F401  registers models, tasks, criterions and optimizers
from fairseq_adaptive.ranges import ranges_of

FILE = Path(__file__).with_name("frozen_flags.txt")
COMMAND = "python tests/frozen_flags.py"


def _ours():
    registries = {"model": MODEL_REGISTRY, "task": TASK_REGISTRY}
    registries.update({name: REGISTRIES[name]["registry"] for name in ("criterion", "optimizer")})
    for kind, registry in registries.items():
        for name, owner in sorted(registry.items()):
            if owner.__module__.startswith("fairseq_adaptive."):
                yield kind, name, owner


def _kind(action, within):
    """What a flag takes: a switch, one of some, a number within a range, a text."""
    if action.nargs == 0:
        return "switch"
    if action.choices:
        return "{" + ",".join(map(str, action.choices)) + "}"
    kind = getattr(action.type, "__name__", "str")
    return f"{kind} {within}" if within is not None else kind.replace("<lambda>", "list")


def _flags(owner):
    """Lines of the flags of a registered class: name, what it takes, default."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    config = getattr(owner, "__dataclass", None)
    if config is not None:
        gen_parser_from_dataclass(parser, config())
    else:
        owner.add_args(parser)
    ranges = ranges_of(owner)
    for action in sorted(parser._actions, key=lambda each: each.dest):
        name = action.option_strings[0] if action.option_strings else action.dest
        yield f"  {name}  {_kind(action, ranges.get(action.dest))}  = {action.default}"


def _preset(name):
    """What an architecture says of flags, without what it shares with its model."""
    found = []
    for each in (name, ARCH_MODEL_NAME_REGISTRY[name]):
        args = argparse.Namespace()
        ARCH_CONFIG_REGISTRY[each](args)
        found.append(vars(args))
    own, common = found
    own = own if name == ARCH_MODEL_NAME_REGISTRY[name] else {k: v for k, v in own.items() if common.get(k, own) != v}
    return [f"  {key} = {value}" for key, value in sorted(own.items())]


def frozen():
    """The text of the file: classes with their flags, then presets with what they say of them."""
    lines = []
    for kind, name, owner in _ours():
        lines += [f"{kind} {name}", *_flags(owner), ""]
    for name in sorted(ARCH_CONFIG_REGISTRY):
        if ARCH_CONFIG_REGISTRY[name].__module__.startswith("fairseq_adaptive."):
            lines += [f"preset {name} of {ARCH_MODEL_NAME_REGISTRY[name]}", *_preset(name), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    FILE.write_text(frozen(), encoding="utf-8")
    print(f"wrote {FILE}")

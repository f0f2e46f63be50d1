"""A dataclass for models that declare their flags to a parser, as fairseq's Transformer and RoBERTa do.

``add_args`` stays the one definition: the dataclass is made from it, for ``fairseq-hydra-train`` (``model=NAME``), for the
page of flags and for what is checked.
"""

import dataclasses
import sys
from argparse import SUPPRESS, Action, ArgumentParser
from typing import Any, List, Optional, Tuple

from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.models import ARCH_MODEL_INV_REGISTRY, ARCH_MODEL_REGISTRY, register_model

from fairseq_adaptive.ranges import Range


class FlagsConfig(FairseqDataclass):
    """What these dataclasses are of: a flag that is None was not given, and is the architecture's to fill."""

    none_is_not_given = True


def register_with_config(name: str):
    """As fairseq's ``register_model``, with a dataclass of the flags in ``add_args``: ``TranskimmerModelConfig``.

    An architecture of the model's own name may be registered, as for models without a dataclass.

    Args:
        name: of the model
    """

    def register(owner):
        config = dataclass_of(owner)
        setattr(sys.modules[owner.__module__], config.__name__, config)  # where pickle looks for it
        owner = register_model(name, dataclass=config)(owner)
        ARCH_MODEL_REGISTRY.pop(name, None)  # fairseq has registered one that says nothing
        ARCH_MODEL_INV_REGISTRY[name].clear()
        return owner

    return register


def dataclass_of(owner: type) -> type:
    """A dataclass of the flags that a class declares: what has no default is None, switches are off."""
    parser = ArgumentParser(argument_default=SUPPRESS, add_help=False)
    owner.add_args(parser)
    fields = [(each.dest, *_field(each)) for each in parser._actions]
    config = dataclasses.make_dataclass(f"{owner.__name__}Config", fields, bases=(FlagsConfig,))
    config.__module__, config.__doc__ = owner.__module__, f"The flags of :class:`{owner.__name__}`."
    return config


def _field(action: Action) -> Tuple[Any, dataclasses.Field]:
    default = None if action.default == SUPPRESS else action.default
    metadata = {"help": action.help}
    if action.nargs == 0:
        kind, default = bool, not action.const
    elif action.choices:
        kind = Optional[ChoiceEnum(list(action.choices))]
    elif isinstance(action.type, Range):
        kind, metadata["range"] = Optional[action.type.kind], action.type
    elif getattr(action.type, "__name__", "") == "<lambda>":  # how fairseq parses a list
        kind = Optional[List[int]]
    else:
        kind = Optional[action.type] if action.type else Any  # fairseq's Transformer has numbers without a type
    return kind, dataclasses.field(default=default, metadata=metadata)

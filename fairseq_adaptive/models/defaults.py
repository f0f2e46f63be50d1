"""What a flag is where it is not given. There is one meaning of that: it is absent, or None.

What is False, 0, empty or "none" is given: a user, or a configuration for fairseq-hydra-train, may have asked for it.
"""

import dataclasses
from argparse import Namespace
from typing import Any, Callable, Dict

from omegaconf import OmegaConf


def fill_defaults(args, **values):
    """Set those of ``values`` that are not given.

    The arguments of a policy, ``router_args`` beside ``router``, are left out where another policy is given.

    Args:
        args: namespace or DictConfig with flags
    """
    given = {name: getattr(args, name) for name in values if getattr(args, name, None) is not None}
    for name, value in values.items():
        policy = name.removesuffix("_args")
        if name not in given and given.get(policy, values.get(policy)) == values.get(policy):
            setattr(args, name, value)


def fill_architecture(args, architecture: Callable):
    """Set what an architecture of fairseq's sets; several of those take None for given.

    Args:
        args: namespace or DictConfig with flags
        architecture: takes a namespace
    """
    given = Namespace(**{name: value for name, value in flags(args).items() if value is not None})
    architecture(given)
    for name, value in vars(given).items():
        setattr(args, name, value)


def flags(args) -> Dict[str, Any]:
    """The flags of a namespace, DictConfig or dict."""
    if OmegaConf.is_config(args):
        return OmegaConf.to_container(args, resolve=True, enum_to_str=True)
    return args if isinstance(args, dict) else vars(args)


def with_defaults(args, config) -> Namespace:
    """Return flags with the defaults of a dataclass where they are not given, as in a checkpoint that is older than a flag.

    Args:
        args: namespace or DictConfig
        config: the dataclass; defaults that refer to other parts of the configuration are not taken
    """
    found = Namespace(**flags(args))
    defaults = {each.name: each.default for each in dataclasses.fields(config)}
    fill_defaults(found, **{name: value for name, value in defaults.items() if not str(value).startswith("${")})
    return found

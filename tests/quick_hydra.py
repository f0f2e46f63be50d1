"""What hydra does anew in every call of fairseq's options, once: a copy of all registered configurations, which it never writes
to, the parsing of each ``key=value``, and the composition of the same groups, to which values are given as hydra gives them."""

import copy
import functools

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser

_parse = OverridesParser.parse_rule


@functools.lru_cache(maxsize=20_000)
def _parsed(text, rule):
    return _parse(OverridesParser.create(), text, rule)


def install():
    """Change hydra in this process."""
    import fairseq.dataclass.utils as options

    if hasattr(options.compose, "cache"):
        return
    compose, cache = options.compose, {}

    def composed(name, overrides, strict):
        names = [each.partition("=")[0] for each in overrides]
        groups = [each for each, key in zip(overrides, names) if "." not in key]
        key = name, tuple(names), tuple(groups)
        if key not in cache:
            cache[key] = compose(name, overrides=overrides, strict=strict), overrides
        found, before = cache[key]
        others = [each for each, other in zip(overrides, before) if each != other]
        found = copy.deepcopy(found)
        ConfigLoaderImpl._apply_overrides_to_config(OverridesParser.create().parse_overrides(others), found)
        return found

    options.compose, composed.cache, composed.stock = composed, cache, compose
    ConfigStore.__deepcopy__ = lambda self, memo: self
    OverridesParser.parse_rule = lambda self, text, rule: copy.copy(_parsed(text, rule))


def prime():
    """Parse what every training and every generation of fairseq's gives."""
    from fairseq import options
    from fairseq.dataclass.utils import override_module_args

    parsers = options.get_training_parser(), options.get_generation_parser()
    for parser, flags in zip(parsers, (["--arch", "transformer"], [])):
        overrides, _ = override_module_args(options.parse_args_and_arch(parser, ["DATA", *flags]))
        OverridesParser.create().parse_overrides(overrides)

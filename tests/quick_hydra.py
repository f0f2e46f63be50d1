"""What hydra does anew in every call of fairseq's options, once: a copy of all registered configurations, which it never writes
to, and the parsing of each ``key=value``. Half of the time of a composition; the result is the same."""

import copy
import functools

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser

_parse = OverridesParser.parse_rule


@functools.lru_cache(maxsize=20_000)
def _parsed(text, rule):
    return _parse(OverridesParser.create(), text, rule)


def install():
    """Change hydra in this process."""
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

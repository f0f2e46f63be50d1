"""The range of a number that comes from outside: declared once, beside its flag, and checked and explained from there.

A flag of a parser is declared with ``type=``, a field of a dataclass with :func:`ranged`, an entry of a file with
:meth:`Range.check`. fairseq-hydra-train and checkpoints do not pass the parser: what is built from flags calls
:func:`check_ranges`.
"""

import argparse
import dataclasses
from dataclasses import dataclass, field
from typing import Any, Dict, Mapping, Optional, Union

from fairseq_adaptive.errors import UsageError


@dataclass(frozen=True)
class Range:
    """Whole numbers or numbers between two bounds; neither NaN nor infinity is in any range.

    Args:
        kind: int or float
        least, most: the bounds
        above: ``least`` itself is outside
        below: ``most`` itself is outside

    Example:
        >>> parser.add_argument("--heads", type=Range(int, 1, 64))
    """

    kind: type
    least: float
    most: float
    above: bool = False
    below: bool = False

    @property
    def __name__(self):
        return self.kind.__name__  # argparse asks its types for one

    def __str__(self):
        least, most = (f"{int(bound):,}" if bound == int(bound) else f"{bound:g}" for bound in (self.least, self.most))
        if self.above:
            return f"above {least} and {'below' if self.below else 'up to'} {most}"
        return f"from {least} to {'below ' if self.below else ''}{most}"

    def __contains__(self, value) -> bool:
        if isinstance(value, bool) or not isinstance(value, int if self.kind is int else (int, float)):
            return False
        return (value > self.least if self.above else value >= self.least) and (
            value < self.most if self.below else value <= self.most
        )

    @property
    def wanted(self) -> str:
        """What would be right, for messages."""
        return f"use a {'whole ' if self.kind is int else ''}number {self}"

    def __call__(self, text: str) -> Union[int, float]:
        """The number in a text; argparse calls this.

        Raises:
            argparse.ArgumentTypeError: when it is none, or out of range
        """
        try:
            value = self.kind(text)
        except ValueError:
            value = None
        if value not in self:
            raise argparse.ArgumentTypeError(f"{str(text)[:40]!r} is impossible: {self.wanted}")
        return value

    def check(self, value, name: str):
        """Return ``value``.

        Args:
            value: a number, or what a file has in its place
            name: of it, for the message

        Raises:
            UsageError: when it is no number, or out of range
        """
        if value not in self:
            shown = str(value) if isinstance(value, (int, float)) else repr(value)
            raise UsageError(f"{name} is {shown[:40]}: {self.wanted}")
        return value


LAYERS = Range(int, 1, 1000)
WIDTH = Range(int, 1, 65536)
OPTIONAL_WIDTH = Range(int, 0, 65536)  # 0: none
FFN_WIDTH = Range(int, 1, 1 << 20)
HEADS = Range(int, 1, 1024)
POSITIONS = Range(int, 1, 1 << 20)
DISTANCE = Range(int, 0, 1 << 20)
WORDS = Range(int, 1, 1 << 24)
BANK = Range(int, 1, 10**7)
COUNT = Range(int, 1, 10**9)
UPDATES = Range(int, 0, 10**9)
BATCH = Range(int, 1, 1 << 20)
ROUNDS = Range(int, 1, 100000)
SEED = Range(int, 0, (1 << 32) - 1)
THREADS = Range(int, 1, 4096)
SHARE = Range(float, 0, 1)
POSITIVE_SHARE = Range(float, 0, 1, above=True)
RATE = Range(float, 0, 1, above=True, below=True)  # of a geometric distribution
DROPOUT = Range(float, 0, 1, below=True)
PRICE = Range(float, 0, 1e6)
FACTOR = Range(float, 1, 1024)  # of widths
TEMPERATURE = Range(float, 1e-6, 1e6)
POSITIVE = Range(float, 0, 1e6, above=True)
NUMBER = Range(float, -1e6, 1e6)
BIAS = Range(float, -100, 100)  # of logits

# flags that fairseq declares and that are ours, too, since our models, tasks, criterions and optimizers take them over
INHERITED = {
    **{
        f"{side}_{name}": each
        for side in ("encoder", "decoder")
        for name, each in {
            "layers": LAYERS,
            "embed_dim": WIDTH,
            "ffn_embed_dim": FFN_WIDTH,
            "attention_heads": HEADS,
            "layerdrop": DROPOUT,
            "input_dim": WIDTH,
            "output_dim": WIDTH,
        }.items()
    },
    **dict.fromkeys(
        (
            "dropout",
            "attention_dropout",
            "activation_dropout",
            "relu_dropout",
            "pooler_dropout",
            "adaptive_softmax_dropout",
            "label_smoothing",
        ),
        DROPOUT,
    ),
    **dict.fromkeys(("max_positions", "max_source_positions", "max_target_positions", "tokens_per_sample"), POSITIONS),
    **dict.fromkeys(("adaptive_input_factor", "adaptive_softmax_factor"), FACTOR),
    **dict.fromkeys(("quant_noise_pq", "quant_noise_scalar"), SHARE),
    **dict.fromkeys(("mha_reg_scale_factor", "ffn_reg_scale_factor", "weight_decay"), PRICE),
    **dict.fromkeys(("mha_heads_to_keep", "ffn_blocks_to_remove"), Range(int, -1, 1 << 20)),
    "adam_eps": POSITIVE_SHARE,
    "base_layers": Range(int, 0, 1000),
    "base_shuffle": Range(int, 0, 1),
    "base_sublayers": Range(int, 0, 1000),
    "char_embedder_highway_layers": Range(int, 0, 1000),
    "character_embedding_dim": WIDTH,
    "ignore_prefix_size": DISTANCE,
    "min_params_to_wrap": Range(int, 0, 10**12),
    "output_dictionary_size": Range(int, -1, 1 << 24),
    "quant_noise_pq_block_size": WIDTH,
}


def ranged(default, within: Range, help: str) -> Any:
    """A field of a fairseq dataclass with a range, which its help names."""
    return field(default=default, metadata={"help": f"{help} [{within}]", "range": within})


def ranges_of(owner) -> Dict[str, Range]:
    """The ranges of the flags of a dataclass, or of a class that fairseq's registries know, by their names."""
    owner = getattr(owner, "__dataclass", None) or owner
    if dataclasses.is_dataclass(owner):
        known = {
            each.name: each.metadata.get("range") or INHERITED.get(each.name)
            for each in dataclasses.fields(owner)
            if each.type not in (str, bool, Optional[str])
        }
        return {name: within for name, within in known.items() if within is not None}
    parser = argparse.ArgumentParser()
    owner.add_args(parser)
    return {action.dest: action.type for action in parser._actions if isinstance(action.type, Range)}


def check_ranges(cfg, owner) -> None:
    """Check flags where they have been parsed by others.

    Args:
        cfg: a configuration, namespace or mapping of flags; those that it lacks and None are not checked
        owner: a dataclass, or a model, task, criterion or optimizer that is registered

    Raises:
        UsageError: for the first that is out of its range
    """
    for name, within in ranges_of(owner).items():
        value = cfg.get(name) if isinstance(cfg, Mapping) else getattr(cfg, name, None)
        if value is not None:
            value = int(value) if isinstance(value, bool) else value  # fairseq says --base-shuffle False
            within.check(value, "--" + name.replace("_", "-"))


def declare_ranges(parser, *configs) -> None:
    """Give a model's flags the ranges of the dataclasses that they are made of and of :data:`INHERITED`; explain all.

    Args:
        parser: or a group; flags that have a range are only explained
        configs: dataclasses
    """
    known = dict(INHERITED)
    for config in configs:
        known.update(ranges_of(config))
    for action in getattr(parser, "_group_actions", None) or parser._actions:
        if action.type in (int, float) and action.dest in known:
            action.type = known[action.dest]
        if isinstance(action.type, Range):
            explain_range(action)


def explain_range(action) -> None:
    """Say in the help of a flag which numbers it takes."""
    said = f"[{action.type}]"
    if said not in (action.help or ""):
        action.help = f"{action.help or ''} {said}".strip()


class Parser(argparse.ArgumentParser):
    """A command's parser: no abbreviated flags, and the help of a number names its range."""

    def __init__(self, **options):
        super().__init__(**{"allow_abbrev": False, **options})

    def _add_action(self, action):
        if isinstance(action.type, Range):
            explain_range(action)
        return super()._add_action(action)

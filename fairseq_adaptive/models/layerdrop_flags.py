"""The flags that say how ``--encoder-layerdrop`` and ``--decoder-layerdrop`` change with depth and time."""

from dataclasses import dataclass, field
from typing import Dict

from fairseq.dataclass import ChoiceEnum, FairseqDataclass

from fairseq_adaptive.modules.stack.layer_dropout import BY_DEPTH
from fairseq_adaptive.ranges import UPDATES, ranged

_BY_DEPTH = (
    "layerdrop of a depth: uniform, all alike; exponential, from 0 at the first to all of it at the last "
    "(LayerSkip, Elhoushi et al., 2024)"
)
_WARMUP = "updates in which layerdrop rises from 0, as 2^(t/T) - 1"


@dataclass
class LayerDropConfig(FairseqDataclass):
    layerdrop_by_depth: ChoiceEnum(BY_DEPTH) = field(default="uniform", metadata={"help": _BY_DEPTH})
    layerdrop_warmup_updates: int = ranged(0, UPDATES, _WARMUP)


def add_layerdrop_args(parser):
    """The same flags for a model that has no dataclass."""
    parser.add_argument("--layerdrop-by-depth", choices=BY_DEPTH, help=f"{_BY_DEPTH} (default: uniform)")
    parser.add_argument("--layerdrop-warmup-updates", type=UPDATES, metavar="T", help=f"{_WARMUP} (default: 0)")


def layerdrop_arguments(args) -> Dict:
    """What a :class:`~fairseq_adaptive.modules.LayerStack` takes of them; flags that are not there are not given."""
    return {
        "layerdrop_by_depth": str(getattr(args, "layerdrop_by_depth", None) or "uniform"),
        "layerdrop_warmup_updates": int(getattr(args, "layerdrop_warmup_updates", None) or 0),
    }

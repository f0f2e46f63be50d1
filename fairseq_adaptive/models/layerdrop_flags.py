"""The flags that say how ``--encoder-layerdrop`` and ``--decoder-layerdrop`` change with depth and time."""

from dataclasses import dataclass, field
from typing import Dict

from fairseq.dataclass import ChoiceEnum, FairseqDataclass

from fairseq_adaptive.modules.stack.layer_dropout import BY_DEPTH
from fairseq_adaptive.ranges import UPDATES, ranged


@dataclass
class LayerDropConfig(FairseqDataclass):
    layerdrop_by_depth: ChoiceEnum(BY_DEPTH) = field(
        default="uniform",
        metadata={
            "help": "layerdrop of a depth: uniform, all alike; exponential, from 0 at the first to all of it at the last "
            "(LayerSkip, Elhoushi et al., 2024)"
        },
    )
    layerdrop_warmup_updates: int = ranged(0, UPDATES, "updates in which layerdrop rises from 0, as 2^(t/T) - 1")


def layerdrop_arguments(args) -> Dict:
    """What a :class:`~fairseq_adaptive.modules.LayerStack` takes of them; flags that are not there are not given."""
    return {
        "layerdrop_by_depth": str(getattr(args, "layerdrop_by_depth", None) or "uniform"),
        "layerdrop_warmup_updates": int(getattr(args, "layerdrop_warmup_updates", None) or 0),
    }

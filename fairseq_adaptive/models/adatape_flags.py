"""Flags of the tape and of what else is adaptive beside it, and what is built from them.

Xue et al., *Adaptive Computation with Elastic Input Sequence* (ICML 2023).
"""

from argparse import Namespace
from dataclasses import dataclass, field
from typing import Optional

from fairseq.dataclass import ChoiceEnum

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.models.policy_flags import Policies, PolicyConfig
from fairseq_adaptive.models.roberta_family import check_heads
from fairseq_adaptive.modules.policies.tape import COSTS, QUERIES, QUERY_UPDATES, GatedMLP, Tape, TapeReader
from fairseq_adaptive.ranges import BIAS, DROPOUT, OPTIONAL_WIDTH, POSITIVE, PRICE, WIDTH, Range, check_ranges, ranged

TAPE, TAPE_LAYER = Range(int, 0, 10000), Range(int, 0, 999)
TAPE_HELP = {
    "tape_mlp_dim": "width of the gated MLP between bank and sequence; 0: none",
    "tape_ffn_embed_dim": "width of the second feed-forward, for tape tokens, in each layer; 0: none",
}


@dataclass
class TapeConfig(PolicyConfig):
    tape_tokens: int = ranged(10, TAPE, "the longest tape; 0: no tape, a plain Transformer")
    tape_threshold: float = ranged(
        2.0,
        POSITIVE,
        "sum of certainties at which a sequence stops reading; a tape token mixes as many bank entries as "
        "--tape-tokens // this",
    )
    tape_cost: ChoiceEnum(COSTS) = field(
        default="entropy", metadata={"help": "ponder cost of a step with weights w: 1 - sum of w^2, or 1 - max w"}
    )
    tape_query: ChoiceEnum(QUERIES) = field(
        default="mean",
        metadata={
            "help": "what the tape is read with: the mean of the states, or the first ([CLS]), which knows the "
            "others from --tape-layer 1 on"
        },
    )
    tape_query_update: ChoiceEnum(QUERY_UPDATES) = field(
        default="average", metadata={"help": "the next query: average of query and token read, or that token"}
    )
    tape_key_dim: Optional[int] = ranged(
        None, WIDTH, "dimensions in which query and entries are compared (default: those of a head)"
    )
    tape_mlp_dim: int = ranged(0, OPTIONAL_WIDTH, TAPE_HELP["tape_mlp_dim"])
    tape_ffn_embed_dim: int = ranged(0, OPTIONAL_WIDTH, TAPE_HELP["tape_ffn_embed_dim"])
    tape_layer: int = ranged(0, TAPE_LAYER, "how many layers run before the tape is read")
    tape_allow_exhausted: bool = field(
        default=False,
        metadata={"help": "a sequence that has read its whole bank stops, instead of refusing such banks"},
    )
    tape_query_noise: float = ranged(0.0, PRICE, "deviation of noise on the query in training")
    tape_bank_dropout: float = ranged(0.0, DROPOUT, "probability that a sequence cannot see an entry in training")
    skimming: bool = field(
        default=False,
        metadata={
            "help": "predictors before each layer skim tokens, those of the tape, too, but never the first (Guan "
            "et al., 2022); train with --criterion skim_loss"
        },
    )
    skim_bias: float = ranged(5.0, BIAS, "how sure these predictors are at first that a token is kept")


def check_flags(cfg, owner):
    """
    Args:
        cfg: flags
        owner: the model

    Raises:
        UsageError: for numbers out of range, and heads that do not divide the width
    """
    check_ranges(cfg, owner)
    check_heads(cfg)


def build_tape(cfg, embed_dim, heads, depths) -> Optional[Tape]:
    """Return the tape of a :class:`TapeConfig` (or a namespace with its names), None where there is to be none.

    Args:
        embed_dim: C
        heads: of the attention
        depths: of the stack

    Raises:
        UsageError: when options contradict each other
    """
    if cfg.tape_tokens == 0:
        return None
    if not 0 <= cfg.tape_layer < depths:
        raise UsageError(f"--tape-layer is {cfg.tape_layer}: use 0 to {depths - 1}")
    reader = TapeReader(
        embed_dim,
        num_tokens=cfg.tape_tokens,
        threshold=cfg.tape_threshold,
        key_dim=cfg.tape_key_dim or embed_dim // heads,
        cost=str(cfg.tape_cost),
        query_update=str(cfg.tape_query_update),
        allow_exhausted=cfg.tape_allow_exhausted,
        query_noise=cfg.tape_query_noise,
        bank_dropout=cfg.tape_bank_dropout,
    )
    mlp = GatedMLP(embed_dim, cfg.tape_mlp_dim) if cfg.tape_mlp_dim else None
    return Tape(reader, mlp, str(cfg.tape_query), cfg.tape_layer)


def tape_policies(cfg) -> Policies:
    """What the flags say of router and halting rule; the reader is that of :func:`build_tape`.

    Raises:
        UsageError: for another reader, and where --skimming and --router contradict each other
    """
    reader = getattr(cfg, "reader", None) or "none"
    if reader not in ("none", "tape") or (reader == "tape" and not cfg.tape_tokens):
        raise UsageError(f"--reader {reader}: this architecture reads the tape of --tape-tokens; leave it out")
    if getattr(cfg, "reader_args", None):
        raise UsageError("--reader-args: the tape of this architecture has flags of its own, --tape-tokens and others")
    named = str(getattr(cfg, "router", None) or "none")
    if cfg.skimming and named not in ("none", "skimming"):
        raise UsageError(f"--skimming and --router {named} contradict each other: leave one of them out")
    skimming = {"bias": cfg.skim_bias} if cfg.skimming or named == "skimming" else None
    cfg = Namespace(**{**vars(cfg), "reader": "none", "reader_args": None})
    return Policies(cfg, "encoder", "skimming" if cfg.skimming else "none", skimming)

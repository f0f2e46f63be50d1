"""Flags that change nothing where another one is not given: refused, or said in one warning where that can be meant.

Found by building each family with and without each of its flags, in several settings, and comparing parameters, outputs in
training and evaluation, and prices.
"""

import logging
from argparse import SUPPRESS, ArgumentParser, Namespace
from dataclasses import MISSING, fields
from typing import Callable, Dict, List, NamedTuple

from fairseq.models import ARCH_CONFIG_REGISTRY

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.models.defaults import fill_defaults, with_defaults

logger = logging.getLogger(__name__)


class Need(NamedTuple):
    """What flags need.

    Attributes:
        names: of the flags
        what: for the message
        met: whether they have it, from all flags of the model or criterion
        refused: rather than warned of
    """

    names: tuple
    what: str
    met: Callable[[Dict], bool]
    refused: bool = False


def _has(flags, kind, sides=("", "encoder_", "decoder_")):
    return any(str(flags.get(f"{side}{kind}") or "none") != "none" for side in sides)


def _skims(flags):
    return _has(flags, "router") or flags.get("skimming") or not flags.get("no_skimming", True)


def _shares(flags):
    if "layer_sharing" not in flags:
        return flags.get("encoder_layers") != 1  # one layer at all depths
    sides = [side for side in ("encoder", "decoder") if flags.get(f"{side}_unique_layers")]
    return any(flags[f"{side}_unique_layers"] != flags.get(f"{side}_layers") for side in sides)


_TAPE = "threshold cost query query_update key_dim mlp_dim ffn_embed_dim layer allow_exhausted query_noise bank_dropout"
_PRUNING = ("mha_reg_scale_factor", "ffn_reg_scale_factor", "mha_heads_to_keep", "ffn_blocks_to_remove")
MODEL = (
    Need(("halting_threshold",), "--halting", lambda flags: _has(flags, "halting"), refused=True),
    *(
        Need(
            (f"{side}_halting_threshold",),
            f"--{side}-halting",
            lambda flags, side=side: _has(flags, "halting", ("", f"{side}_")),
            refused=True,
        )
        for side in ("encoder", "decoder")
    ),
    Need(_PRUNING, "fairseq's own --arch roberta: layers are not pruned here", lambda flags: False, refused=True),
    Need(("skim_bias", "skim_noise", "protect_separators"), "skimming", _skims),
    Need(("layer_sharing", "depth_lora_rank"), "fewer unique layers than there are layers", _shares),
    Need(
        tuple(f"tape_{name}" for name in _TAPE.split()) + ("tape_bank", "tape_bank_size", "tape_bank_patch_size"),
        "--tape-tokens above 0",
        lambda flags: flags["tape_tokens"] > 0,
    ),
    Need(("tape_bank_size",), "--tape-bank learned", lambda flags: str(flags.get("tape_bank", "learned")) == "learned"),
    Need(("tape_bank_patch_size",), "--tape-bank input", lambda flags: str(flags.get("tape_bank")) == "input"),
    Need(
        ("adaptive_softmax_dropout", "tie_adaptive_weights"),
        "--adaptive-softmax-cutoff",
        lambda flags: bool(flags.get("adaptive_softmax_cutoff")),
    ),
    Need(  # a Transformer-XL has a projection then
        ("adaptive_softmax_factor",),
        "--adaptive-softmax-cutoff",
        lambda flags: bool(flags.get("adaptive_softmax_cutoff")) or "memory_length" in flags,
    ),
    Need(
        ("adaptive_input_cutoff", "adaptive_input_factor"),
        "--adaptive-input",
        lambda flags: bool(flags.get("adaptive_input")),
    ),
    Need(
        ("character_filters", "character_embedding_dim", "char_embedder_highway_layers"),
        "--character-embeddings",
        lambda flags: bool(flags.get("character_embeddings")),
    ),
    Need(("quant_noise_pq_block_size",), "--quant-noise-pq", lambda flags: bool(flags.get("quant_noise_pq"))),
)
CRITERION = (
    Need(
        ("target_depth_weight", "target_depth_rate"), "--target-depth", lambda flags: flags["target_depth"] is not None
    ),
    Need(
        ("time_penalty", "time_penalty_warmup_updates"),
        "no --target-depth, which takes their place",
        lambda flags: flags["target_depth"] is None,
    ),
    Need(("target_flops_gain", "target_flops_rate"), "--target-flops", lambda flags: flags["target_flops"] is not None),
    Need(("skim_factor",), "no --target-flops, which takes its place", lambda flags: flags["target_flops"] is None),
    Need(("distill_weight", "distill_temperature"), "--distill-from", lambda flags: bool(flags["distill_from"])),
    Need(("entropy_warmup_updates",), "--entropy-weight", lambda flags: flags["entropy_weight"] > 0),
    Need(("compute_weight",), "--target-compute", lambda flags: flags["target_compute"] > 0),
)


def check_model_flags(flags: Dict, owner):
    """Check the flags of a model, all of them.

    Args:
        flags: with the name of the architecture as ``_name``
        owner: the model's class

    Raises:
        UsageError: for a flag that changes nothing and cannot be meant
    """
    usual = Namespace()
    architecture = ARCH_CONFIG_REGISTRY.get(flags.get("_name"))
    if architecture is not None:
        architecture(usual)
    config = getattr(owner, "__dataclass", None)
    if config is not None:
        usual = with_defaults(usual, config)
    else:
        parser = ArgumentParser(argument_default=SUPPRESS, add_help=False)
        owner.add_args(parser)
        fill_defaults(usual, **{each.dest: each.default for each in parser._actions if each.default != SUPPRESS})
    _check({**vars(usual), **flags}, vars(usual), MODEL)


def check_criterion_flags(flags: Dict, owner):
    """Check the flags of a criterion with a dataclass, as :func:`check_model_flags`."""
    usual = {each.name: each.default for each in fields(getattr(owner, "__dataclass")) if each.default is not MISSING}
    _check({**usual, **flags}, usual, CRITERION)


def without_effect(flags: Dict, usual: Dict, needs) -> List:
    """The flags that are given, unlike what is usual, without what they need, each with that :class:`Need`."""
    return [
        (name, need)
        for need in needs
        for name in need.names
        if name in flags and _given(flags[name], usual.get(name)) and not need.met(flags)
    ]


def _given(value, usual):
    return value is not None and value != usual and str(value) != str(usual)


def _check(flags, usual, needs):
    found = without_effect(flags, usual, needs)
    for name, need in found:
        if need.refused:
            raise UsageError(f"{_flag(name)} changes nothing without {need.what}: add that, or leave it out")
    if found:
        said = [f"{_flag(name)} without {need.what}" for name, need in found]
        logger.warning("these flags change nothing: %s", "; ".join(said))


def _flag(name):
    return "--" + name.replace("_", "-")

"""Flags that change nothing where another one is not given: refused, or said in one warning where that can be meant.

Found by running: tests/models/test_flags_take_effect.py builds each family with each of its flags changed, and
tests/criterions/test_criterion_flags.py each criterion. Pairs of flags, of which one takes the place of the other, were
searched through once.
"""

import logging
from argparse import Namespace
from dataclasses import MISSING, fields
from typing import Callable, Dict, List, NamedTuple

from fairseq.models import ARCH_CONFIG_REGISTRY

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.models.defaults import with_defaults

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


SIDES = ("encoder", "decoder")
# of a side, and of both: for a side that has no such flag, or no policy, of its own
_OF_POLICIES = (
    ("halting", "halting_threshold", "halting_threshold"),
    ("halting", "exit_quantile", "exit_quantile"),
    ("halting", "halting_args", "halting"),
    ("router", "router_args", "router"),
    ("reader", "reader_args", "reader"),
)


def _skims(flags):
    router = str(flags.get("router") or "none")
    return router == "skimming" or (router == "none" and (flags.get("skimming") or not flags.get("no_skimming", True)))


def _has(flags, kind, side):
    """Whether a side has a policy, its own or that of both."""
    if kind == "reader" and side == "decoder":
        return False
    own = flags.get(f"{side}_{kind}")
    name = str((flags.get(kind) if own is None else own) or "none")
    return name != "none" or (kind == "router" and bool(_skims(flags)))


def _shares(flags):
    """Whether a layer serves several depths."""
    if "layer_sharing" not in flags:
        return flags.get("encoder_layers") != 1  # one layer at all depths
    sides = [side for side in SIDES if flags.get(f"{side}_unique_layers")]
    return any(flags[f"{side}_unique_layers"] != flags.get(f"{side}_layers") for side in sides)


def _orders(flags):
    """Whether there are several orders in which layers can serve several depths."""
    return any((flags.get(f"{side}_unique_layers") or 1) not in (1, flags.get(f"{side}_layers")) for side in SIDES)


def _of_policies():
    for kind, flag, own in _OF_POLICIES:
        yield Need(
            (flag,),
            f"--{kind} for a side that has none of its own",
            lambda flags, kind=kind, own=own: any(
                _has(flags, kind, side) and flags.get(f"{side}_{own}") is None for side in SIDES
            ),
            refused=True,
        )
        for side in SIDES if kind != "reader" else ("encoder",):
            met = lambda flags, kind=kind, side=side: _has(flags, kind, side)  # noqa: E731
            yield Need((f"{side}_{flag}",), f"--{side}-{kind}", met, refused=True)


_TAPE = "threshold cost query query_update key_dim mlp_dim ffn_embed_dim layer allow_exhausted query_noise bank_dropout"
_PRUNING = ("mha_reg_scale_factor", "ffn_reg_scale_factor", "mha_heads_to_keep", "ffn_blocks_to_remove")
MODEL = (
    *_of_policies(),
    Need(_PRUNING, "fairseq's own --arch roberta: layers are not pruned here", lambda flags: False, refused=True),
    Need(
        ("router",),
        "--no-skimming: none is what a Transkimmer is given by default, and it skims",
        lambda flags: str(flags.get("router")) != "none" or flags.get("no_skimming", True),
        refused=True,
    ),
    Need(
        ("adaptive_input", "tie_adaptive_weights", "tie_adaptive_proj"),
        "an --arch that has adaptive inputs, as language models have: this one has none",
        lambda flags: "decoder_layers" not in flags or "encoder_layers" not in flags,
        refused=True,
    ),
    Need(("tie_adaptive_proj",), "--tie-adaptive-weights", lambda flags: flags.get("tie_adaptive_weights", True)),
    Need(("skim_bias", "skim_noise"), "skimming", _skims),
    Need(("protect_separators",), "a router", lambda flags: _has(flags, "router", "encoder")),
    Need(
        ("layerdrop_by_depth", "layerdrop_warmup_updates"),
        "--encoder-layerdrop or --decoder-layerdrop",
        lambda flags: any(flags.get(f"{side}_layerdrop") for side in SIDES),
    ),
    Need(("no_decoder_final_norm",), "--decoder-normalize-before", lambda flags: flags.get("decoder_normalize_before")),
    Need(
        ("encoder_learned_pos", "decoder_learned_pos"),
        "positions, which --no-token-positional-embeddings leaves out",
        lambda flags: not flags.get("no_token_positional_embeddings"),
    ),
    Need(
        ("alignment_layer", "alignment_heads"),
        "attention to the source, which --no-cross-attention leaves out",
        lambda flags: not flags.get("no_cross_attention"),
    ),
    Need(
        ("relu_dropout",),
        "no --activation-dropout, which takes its place",
        lambda flags: not flags.get("activation_dropout"),
    ),
    Need(
        ("adaptive_input",),
        "no --character-embeddings, which take the place of embeddings of words",
        lambda flags: not flags.get("character_embeddings"),
    ),
    Need(  # what is not given is the width of the decoder
        ("decoder_input_dim",),
        "no --character-embeddings, which are as wide as the decoder",
        lambda flags: not flags.get("character_embeddings") or flags["decoder_input_dim"] == flags["decoder_embed_dim"],
    ),
    Need(
        ("share_decoder_input_output_embed",),
        "no --adaptive-softmax-cutoff, whose embeddings are its own",
        lambda flags: not flags.get("adaptive_softmax_cutoff") or "memory_length" in flags,
    ),
    Need(("base_shuffle", "base_sublayers"), "--base-layers, which shared layers cannot have", lambda flags: False),
    Need(("char_inputs",), "a use in fairseq, which has it for old checkpoints alone", lambda flags: False),
    Need(("layer_sharing",), "several unique layers, and fewer than there are layers", _orders),
    Need(("depth_lora_rank",), "fewer unique layers than there are layers", _shares),
    Need(
        tuple(f"tape_{name}" for name in _TAPE.split()) + ("tape_bank", "tape_bank_size", "tape_bank_patch_size"),
        "--tape-tokens above 0",
        lambda flags: flags["tape_tokens"] > 0,
    ),
    Need(
        ("tape_query",),
        "a sequence of several tokens: here it is one, and their mean",
        lambda flags: flags.get("_name") != "adatape_parity",
    ),
    Need(
        ("tape_cost",),
        "tape tokens of several entries: here --tape-tokens // --tape-threshold is 1, and each is sure of its own",
        lambda flags: flags["tape_tokens"] // flags["tape_threshold"] > 1,
    ),
    Need(("tape_bank_size",), "--tape-bank learned", lambda flags: str(flags.get("tape_bank", "learned")) == "learned"),
    Need(("tape_bank_patch_size",), "--tape-bank input", lambda flags: str(flags.get("tape_bank")) == "input"),
    Need(
        ("adaptive_softmax_dropout",),
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
_POLICIES = "policies of the model"  # beside the flags of a criterion
CRITERION = (
    Need(
        ("time_penalty", "time_penalty_warmup_updates"),
        "a halting rule that has a price of depth (PonderNet's is --kl-weight)",
        lambda flags: any(each.priced and not each.weighs_depths for each in _halting_of(flags)),
    ),
    Need(
        ("kl_weight", "prior_rate"),
        "--halting pondernet",
        lambda flags: any(each.weighs_depths for each in _halting_of(flags)),
    ),
    Need(("exit_every",), "--exit-curriculum rotational", lambda flags: str(flags["exit_curriculum"]) == "rotational"),
    Need(
        ("exit_curriculum_updates",),
        "--exit-curriculum gradual",
        lambda flags: str(flags["exit_curriculum"]) == "gradual",
    ),
    Need(("ponder_penalty",), "a tape", lambda flags: any(each.kind == "reader" for each in flags[_POLICIES])),
    Need(
        ("label_smoothing",),
        "classes, which --regression-target has not",
        lambda flags: "ponder_penalty" not in flags or not flags.get("regression_target"),
    ),
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
    usual = with_defaults(usual, getattr(owner, "__dataclass"))
    given = Namespace(**{**vars(usual), **flags})
    fill = getattr(owner, "architecture", None)
    if fill is not None:
        fill(given)
    _check(vars(given), vars(usual), MODEL)


def _halting_of(flags):
    return [each for each in flags[_POLICIES] if each.kind == "halting"]


def check_criterion_flags(flags: Dict, owner, policies=()):
    """Check the flags of a criterion with a dataclass, as :func:`check_model_flags`; ``policies`` are the model's."""
    usual = {each.name: each.default for each in fields(getattr(owner, "__dataclass")) if each.default is not MISSING}
    _check({**usual, **flags, _POLICIES: list(policies)}, usual, CRITERION)


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

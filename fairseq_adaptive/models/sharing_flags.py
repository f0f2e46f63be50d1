"""Flags of layer sharing, and the configuration that follows from them."""

from fairseq.models.transformer import TransformerConfig

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.models.defaults import fill_defaults
from fairseq_adaptive.models.layerdrop_flags import layerdrop_arguments
from fairseq_adaptive.models.policy_flags import Policies, check_used
from fairseq_adaptive.models.widths import check_widths
from fairseq_adaptive.modules import STRATEGIES, layer_schedule
from fairseq_adaptive.ranges import LAYERS, OPTIONAL_WIDTH

INITIALISATIONS = ("default", "admin")
DEPTH_LORA_HELP = (
    "rank of what the maps of a shared layer differ by from depth to depth, up to their least dimension; 0: they are the "
    "same (Bae et al., 2024; default: 0)"
)
MIXTURE_OF_RECURSIONS = {"layer_sharing": "middle_cycle", "router": "mixture_of_recursions"}  # of presets


def add_sharing_args(parser, sides):
    """Add the flags of layer sharing for ``encoder``, ``decoder`` or both to a model's parser."""
    parser.add_argument(
        "--layer-sharing", choices=STRATEGIES, help="which unique layer serves which depth (Takase and Kiyono, 2021)"
    )
    for side in sides:
        parser.add_argument(
            f"--{side}-unique-layers",
            type=LAYERS,
            metavar="M",
            help=f"how many {side} layers have parameters of their own; they serve --{side}-layers depths "
            "(default: half of them)",
        )
    parser.add_argument(
        "--init",
        choices=INITIALISATIONS,
        help="admin: scale the residual branches of a deep post-LN model by a profile of the first training step "
        "(Liu et al., 2020)",
    )
    add_depth_lora_arg(parser)


def add_depth_lora_arg(parser):
    """Add the flag of what shared layers differ by to a model's parser."""
    parser.add_argument("--depth-lora-rank", type=OPTIONAL_WIDTH, metavar="R", help=DEPTH_LORA_HELP)


def sharing_architecture(args, sides):
    """Fill in the defaults of layer sharing; the numbers of depths must be set."""
    fill_defaults(
        args,
        layer_sharing="cycle_rev",
        init="default",
        depth_lora_rank=0,
        halting="none",
        halting_threshold=None,
        exit_quantile=None,
    )
    for side in sides:
        fill_defaults(args, **{f"{side}_unique_layers": -(-getattr(args, f"{side}_layers") // 2)})


def sharing_config(args, sides, **policies: Policies) -> TransformerConfig:
    """Return fairseq's configuration of a Transformer with that of layer sharing added.

    Args:
        args: namespace or DictConfig with the flags of the model
        sides: ``encoder``, ``decoder`` or both
        policies: of a side, where they are not those that the common flags give

    Raises:
        UsageError: when options contradict each other
    """
    cfg = TransformerConfig.from_namespace(args)
    cfg.layer_sharing = str(args.layer_sharing)
    cfg.init = str(args.init)
    cfg.depth_lora_rank = check_depth_lora(args)
    cfg.layerdrop_changes = layerdrop_arguments(args)
    if cfg.init not in INITIALISATIONS:
        raise UsageError(f"unknown --init {cfg.init!r}: choose one of {', '.join(INITIALISATIONS)}")
    for side in sides:
        half = getattr(cfg, side)
        half.policies = policies.get(side) or Policies(args, side, alone=len(sides) == 1)
        for kind in ("router", "halting"):
            if getattr(half.policies, kind) == "none":
                continue
            if half.layerdrop:
                raise UsageError(f"--{kind} decides how many layers run: leave out --{side}-layerdrop")
            if cfg.cross_self_attention:
                raise UsageError(f"--{kind} cannot be combined with --cross-self-attention: leave one of them out")
    check_used(args, *(getattr(cfg, side).policies for side in sides))
    if getattr(cfg, "base_layers", 0):
        raise UsageError("--base-layers cannot be combined with shared layers: leave it out")
    learned = [side for side in sides if getattr(cfg, side).learned_pos and not cfg.no_token_positional_embeddings]
    if cfg.quant_noise.scalar and learned:
        raise UsageError("--quant-noise-scalar: fairseq cannot quantize learned positions; leave it out")
    if cfg.offload_activations:
        cfg.checkpoint_activations = True
    check_widths(cfg, sides)
    for side in sides:
        half = getattr(cfg, side)
        if half.layers_to_keep:
            raise UsageError(
                f"--{side}-layers-to-keep removes layers one by one, but here a layer serves several depths"
            )
        half.unique_layers = getattr(args, f"{side}_unique_layers")
        layer_schedule(cfg.layer_sharing, half.unique_layers, half.layers)
        if cfg.init == "admin" and half.normalize_before:
            raise UsageError(f"--init admin is for post-LN models: leave out --{side}-normalize-before")
    return cfg


def check_depth_lora(args) -> int:
    """``--depth-lora-rank``, 0 where it is not given.

    Raises:
        UsageError: where it cannot be combined with another flag
    """
    rank = int(getattr(args, "depth_lora_rank", None) or 0)
    for noise in ("pq", "scalar"):
        if rank and getattr(args, f"quant_noise_{noise}", None):
            raise UsageError(
                f"--depth-lora-rank cannot be combined with --quant-noise-{noise}, which changes matrices: leave one out"
            )
    return rank

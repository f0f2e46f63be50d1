"""fairseq's plain Transformer or RoBERTa as a model with shared layers, which differ from depth to depth by low-rank maps.

Bae et al., *Relaxed Recursive Transformers: Effective Parameter Sharing with Layer-wise LoRA* (ICLR 2025,
arXiv:2410.20672), section 3: the layers that are tied become one, and what each was beyond it the product of rank r that is
nearest, by a singular value decomposition. :mod:`~fairseq_adaptive.interop.unrolling` is the way back.
"""

import argparse
import os
import re
from typing import Any, Dict, List, NamedTuple, Sequence, Tuple

import torch
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_NAME_REGISTRY
from torch import Tensor

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.files import whole_folder
from fairseq_adaptive.interop.checkpoint import load_checkpoint, model_options, save_checkpoint
from fairseq_adaptive.interop.unrolling import LAYERS_OF, unroll_checkpoint
from fairseq_adaptive.interop.verifying import built, require_readable, require_same, scores, sequences
from fairseq_adaptive.modules import STRATEGIES, layer_schedule
from fairseq_adaptive.modules.layers.depth_lora import check_rank
from fairseq_adaptive.ranges import LAYERS, OPTIONAL_WIDTH

STARTS = ("average", "stepwise", "lower", "upper")
_SHARED = {
    "transformer": ("shared_transformer", ("encoder", "decoder")),
    "transformer_lm": ("shared_transformer_lm", ("decoder",)),
    "roberta": ("transkimmer", ("encoder",)),
}


class Converted(NamedTuple):
    """
    Attributes:
        state: the checkpoint
        kept: share of the squared differences between tied layers and what they share that low-rank maps keep, 0 to 1
        exact: all differences are kept whole
        difference: greatest difference of log-probabilities from those of the original, on random words
    """

    state: Dict[str, Any]
    kept: float
    exact: bool
    difference: float


def add_args(parser):
    parser.add_argument(
        "--share", required=True, type=LAYERS, metavar="M", help="unique layers, in the encoder and in the decoder"
    )
    parser.add_argument(
        "--schedule", choices=STRATEGIES, default="cycle", help="what --layer-sharing is to be (default: cycle)"
    )
    parser.add_argument(
        "--share-init",
        choices=STARTS,
        default="average",
        help="what tied layers share: their average, or one of the layers: stepwise, in equal steps from the first to "
        "the last; lower, the first M; upper, the last M (default: average)",
    )
    parser.add_argument(
        "--depth-lora-rank",
        type=OPTIONAL_WIDTH,
        default=0,
        metavar="R",
        help="rank of what tied layers differ by; with their least dimension the model computes the same as before "
        "(default: 0, what differs is lost)",
    )


def write(args) -> str:
    """Write ``args.output/checkpoint.pt`` and return what to say of it.

    Raises:
        UsageError: see :func:`share_layers`; also when files cannot be read or written
    """
    found = share_layers(load_checkpoint(args.input), args.share, args.schedule, args.depth_lora_rank, args.share_init)
    with whole_folder(args.output) as made:
        path = os.path.join(made, "checkpoint.pt")
        save_checkpoint(found.state, path)
        require_readable(path, found.state)
    same = "the same scores as" if found.exact else "scores unlike those of"
    return (
        f"wrote {args.output}/checkpoint.pt, {same} {args.input}: they differ by {found.difference:.3g} at most; rank "
        f"{args.depth_lora_rank} keeps {100 * found.kept:.4g}% of the squared differences between tied layers"
    )


def share_layers(
    state: Dict[str, Any], unique: int, schedule: str = "cycle", rank: int = 0, start: str = "average"
) -> Converted:
    """Return a checkpoint of ``shared_transformer`` (or ``shared_transformer_lm``, or ``transkimmer --no-skimming``) made of
    one of ``transformer`` (or ``transformer_lm``, or ``roberta``).

    At depth d the layer W that serves it, and what that depth was beyond it, ``W_d - W = U S V^T``: ``B = U_r S_r`` and
    ``A = V_r^T``. Biases and norms keep their differences whole where the rank is above 0. A layer that serves one depth
    is that depth's. The result is unrolled and compared with that, and at full rank with the original, too. The state of
    the optimizer is left out.

    Args:
        state: from :func:`~fairseq_adaptive.interop.load_checkpoint`, left as it is
        unique: M, of each side
        schedule: ``--layer-sharing``
        rank: r, 0: no differences
        start: what tied layers share, one of ``STARTS``

    Raises:
        UsageError: for a model of another architecture or without layers to share, numbers that do not fit it, weights that
            have no place, and a result that computes something else
    """
    options = _all_options(model_options(state))
    arch = ARCH_MODEL_NAME_REGISTRY.get(options["_name"])
    if arch not in _SHARED:
        raise UsageError(
            f"the checkpoint is of architecture {options['_name']}: only fairseq's own transformer, transformer_lm and "
            "roberta can be given shared layers"
        )
    shared, sides = _SHARED[arch]
    depths = {side: int(options[f"{side}_layers"]) for side in sides}
    plans = {side: layer_schedule(schedule, unique, count) for side, count in depths.items()}
    if all(unique == count for count in depths.values()):
        raise UsageError(f"--share {unique} shares nothing: the model has {unique} layers, give it fewer")
    original, norms = built(state), []
    weights = dict(original.state_dict())  # by the names of today, whatever fairseq wrote the file
    least = [min(each.shape) for name, each in weights.items() if ".layers." in name and each.dim() == 2]
    if rank:
        check_rank(rank, min(least, default=0))
    for side in sides:
        weights = _share(weights, LAYERS_OF.get(arch, side), plans[side], unique, rank, start, norms)
    options.update({f"{side}_unique_layers": unique for side in sides})
    options.update(_name=shared, arch=shared, layer_sharing=schedule, depth_lora_rank=rank, init="default")
    if arch == "roberta":
        options["no_skimming"] = True
    kept = {
        name: value for name, value in state.items() if name not in ("last_optimizer_state", "args", "cfg", "model")
    }
    made = {"args": None, "cfg": {**state["cfg"], "model": options}, "model": weights, **kept}
    unroll_checkpoint(made)
    exact, inputs = all(lost == 0 for _, lost in norms), sequences(original)
    found, expected = scores(built(made), inputs), scores(original, inputs)
    if exact:
        require_same(found, expected, "the model with shared layers")
    difference = float((found - expected).abs().max())
    whole, lost = (sum(each) for each in zip(*norms))
    return Converted(made, 1 - lost / whole if whole else 1.0, exact, difference)


def _all_options(options):
    """The flags with the defaults of the architecture, which fairseq-hydra-train leaves out of checkpoints."""
    args = argparse.Namespace(**options)
    ARCH_CONFIG_REGISTRY.get(args._name, lambda args: None)(args)
    return vars(args)


def _share(weights, side, schedule, unique, rank, start, norms):
    """Weights with M layers for N; to ``norms`` goes, for every difference, its squared norm and what is lost of it."""
    layer_name = re.compile(rf"{re.escape(side)}\.layers\.(\d+)\.(.+)")
    found, layers = {}, [{} for _ in schedule]
    for name, tensor in weights.items():
        match = layer_name.fullmatch(name)
        if match and int(match[1]) < len(layers):
            layers[int(match[1])][match[2]] = tensor
        else:
            found[name] = tensor
    for number in range(unique):
        served = [depth for depth, each in enumerate(schedule) if each == number]
        first = served[0] if len(served) == 1 else start_of(start, number, unique, len(schedule))
        for rest in layers[served[0]]:
            tied = [layers[depth].get(rest) for depth in served]
            if any(each is None or each.shape != tied[0].shape for each in tied):
                raise UsageError(f"{side}.layers: {rest} is not the same in layers {served}: they cannot be tied")
            dtype, tied = tied[0].dtype, [each.double() for each in tied]
            base = (torch.stack(tied).mean(0) if first is None else layers[first][rest]).to(dtype)
            name = f"{side}.layers.{number}.{rest}"
            found[name] = base
            if len(served) > 1:
                parts = differences(name, [each - base.double() for each in tied], rank, norms)
                found.update({part: each.to(dtype) for part, each in parts.items()})
    return found


def start_of(start: str, number: int, unique: int, depths: int):
    """Which layer a unique one starts from; None: the average of those that are tied.

    Args:
        start: one of ``STARTS``
        number: of the unique layer, 0 to M - 1
        unique, depths: M and N
    """
    if start == "stepwise":
        return round(number * (depths - 1) / (unique - 1)) if unique > 1 else 0
    return {"average": None, "lower": number, "upper": depths - unique + number}[start]


def differences(name: str, beyond: Sequence[Tensor], rank: int, norms: List[Tuple[float, float]]) -> Dict[str, Tensor]:
    """The parameters that are differences, by name, float64.

    Args:
        name: of the weight or bias that is shared
        beyond: for each depth what it is beyond that
        rank: r
        norms: takes, for each depth, the squared norm and what is lost of it

    Raises:
        UsageError: for what differs and is neither a map nor a norm
    """
    module, _, kind = name.rpartition(".")
    squares = [float(each.square().sum()) for each in beyond]
    if not rank:
        norms += [(square, square) for square in squares]
        return {}
    if beyond[0].dim() == 2:
        parts = [low_rank(each, rank) for each in beyond]
        full = rank >= min(beyond[0].shape)
        norms += [(square, 0.0 if full else lost) for square, (_, _, lost) in zip(squares, parts)]
        a, b, _ = zip(*parts)
        return {f"{module}.depth_a": torch.stack(a), f"{module}.depth_b": torch.stack(b)}
    norms += [(square, 0.0) for square in squares]
    if beyond[0].dim() == 1 and kind in ("weight", "bias"):
        return {f"{module}.depth_{kind}": torch.stack(list(beyond))}
    if any(squares):
        raise UsageError(f"{name} differs from layer to layer, and shared layers have no place for that")
    return {}


def low_rank(matrix: Tensor, rank: int) -> Tuple[Tensor, Tensor, float]:
    """Return A r x I and B O x r, whose product B A is the nearest of rank r to a matrix O x I, and the squared distance."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return vh[:rank], u[:, :rank] * s[:rank], float(s[rank:].square().sum())

"""A model with shared layers as fairseq's plain Transformer or RoBERTa."""

import argparse
import re
from typing import Any, Dict

from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_NAME_REGISTRY

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.files import whole_file
from fairseq_adaptive.interop.checkpoint import given_options, save_checkpoint
from fairseq_adaptive.interop.verifying import require_readable, require_same_model
from fairseq_adaptive.models.policy_flags import FLAGS, KINDS, Policies
from fairseq_adaptive.models.sharing_flags import sharing_architecture
from fairseq_adaptive.modules import layer_schedule
from fairseq_adaptive.modules.layers.depth_lora import PARTS, with_difference

_PLAIN = {
    "shared_transformer": ("transformer", ("encoder", "decoder")),
    "shared_transformer_lm": ("transformer_lm", ("decoder",)),
    "transkimmer": ("roberta", ("encoder",)),
}
# where the layers of an encoder are in a model, ours or fairseq's, where they are elsewhere
LAYERS_OF = dict.fromkeys(("transkimmer", "roberta"), "encoder.sentence_encoder")
_OF_TRANSKIMMER = "no_skimming skim_bias skim_noise protect_separators token_types layer_norm_eps int8".split()


def unroll_checkpoint(state: Dict[str, Any]) -> Dict[str, Any]:
    """Return the checkpoint of a plain ``transformer`` (or ``transformer_lm``, or ``roberta``) that computes the same.

    A layer that serves several depths gets one name a depth, all for the same tensors: saved, they take the space of
    one. With ``--depth-lora-rank`` each depth has tensors of its own, sums of what is shared and its differences. The
    configuration of the model becomes a dict, which fairseq loads without any plug-in. A checkpoint that is plain already
    keeps its weights. The state of the optimizer is left out, its parameters are others. Both models are built, and their
    scores compared.

    Args:
        state: from :func:`~fairseq_adaptive.interop.load_checkpoint`, left as it is

    Raises:
        UsageError: when the model is of another architecture, has the residual scales of ``--init admin``, a router,
            halting rule or reader, or weights that a plain Transformer has no place for
    """
    options = given_options(state)
    arch = options["_name"]
    model = ARCH_MODEL_NAME_REGISTRY.get(arch)
    if model in _PLAIN:
        plain, sides = _PLAIN[model]
        options = _all_options(options, sides)
    elif model in ("transformer", "transformer_lm", "roberta"):
        plain, sides = arch, ()
    else:
        raise UsageError(
            f"the checkpoint is of architecture {arch}: only {', '.join(_PLAIN)} and fairseq's own transformer, "
            "transformer_lm and roberta can be exported"
        )
    weights = dict(state["model"])
    if options.get("init") == "admin" or any(".layers.residual." in name for name in weights):
        raise UsageError(
            "the model was trained with --init admin: fairseq's plain Transformer has no residual scales to take over, "
            "so it cannot be exported; train without --init admin"
        )
    title = "RoBERTa" if model in LAYERS_OF else "Transformer"
    _refuse_policies(options, sides, weights, title)
    for side in sides:
        unique = options.pop(f"{side}_unique_layers")
        schedule = layer_schedule(options["layer_sharing"], unique, options[f"{side}_layers"])
        weights = _unroll(weights, LAYERS_OF.get(model, side), schedule)
    ours = [f"{side}{flag}" for flag in FLAGS for side in ("", "encoder_", "decoder_")]
    for name in ("layer_sharing", "init", "depth_lora_rank", "arch", "user_dir", *ours, *_OF_TRANSKIMMER):
        options.pop(name, None)
    options["_name"] = plain
    cfg = {**state["cfg"], "model": options}
    cfg["common"] = {**(cfg.get("common") or {}), "user_dir": None}
    left_out = ("last_optimizer_state", "args", "cfg", "model")
    kept = {name: value for name, value in state.items() if name not in left_out}
    unrolled = {"args": None, "cfg": cfg, "model": weights, **kept}
    require_same_model(unrolled, state, f"the plain {title}")
    return unrolled


def write_plain(unrolled: Dict[str, Any], output) -> None:
    """Write what :func:`unroll_checkpoint` returned, and read it back.

    Raises:
        UsageError: when ``output`` exists, or cannot be written or read
    """
    with whole_file(output) as part:
        save_checkpoint(unrolled, part)
        require_readable(part, unrolled)


def _refuse_policies(options, sides, weights, title):
    # some rules have no weights, others' may have been left out of flags
    found = (re.search(r"\.(?:layers\.)?(router|halting|reader)\.", name) for name in weights)
    kinds = {match[1]: match[1] for match in found if match}
    for side in sides:
        policies = Policies(argparse.Namespace(**options), side, alone=len(sides) == 1)
        kinds.update((kind, f"{kind} {getattr(policies, kind)}") for kind in KINDS if getattr(policies, kind) != "none")
    if kinds:
        raise UsageError(
            f"the model has a policy ({', '.join(sorted(kinds.values()))}): fairseq's plain {title} computes every "
            "token at every depth, so it cannot be exported; train without it"
        )


def _all_options(options, sides):
    """The flags with the defaults of the architecture, which fairseq-hydra-train leaves out of checkpoints."""
    args = argparse.Namespace(**options)
    ARCH_CONFIG_REGISTRY[args._name](args)
    sharing_architecture(args, sides)
    return vars(args)


def _unroll(weights, side, schedule):
    layer_name = re.compile(rf"{re.escape(side)}\.layers\.(\d+)\.(.+)")
    unrolled = {}
    for name, tensor in weights.items():
        match = layer_name.fullmatch(name)
        if not match:
            unrolled[name] = tensor
            continue
        if name.rpartition(".")[2] in PARTS:
            continue
        depths = [depth for depth, index in enumerate(schedule) if index == int(match[1])]
        for place, depth in enumerate(depths):
            unrolled[f"{side}.layers.{depth}.{match[2]}"] = with_difference(weights, name, place)
    return unrolled

"""Weights of a model with a policy more or less, or with another number of positions, made to fit."""

import logging

from fairseq.modules import LearnedPositionalEmbedding

from fairseq_adaptive.compat.restoring import begins_anew
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules.layers.depth_lora import PARTS
from fairseq_adaptive.modules.policies.shift import Shifted

logger = logging.getLogger(__name__)

# parts of parameters' names that are a policy's: router, halting rule, tape (a reader), Admin, differences of depths
POLICY_PARTS = ("router", "halting", "reader", "tape", "bank", "bank_embedding", "tape_ffn", "residual", *PARTS)
_END = "embed_positions.weight"


def fit_weights(model, state_dict, parts=()):
    """Make the weights of another model those of this one, in place, where that is what was asked for.

    In a training that begins from other weights (``--finetune-from-model``, ``--reset-optimizer``) what is a policy's may
    be missing, and starts as it is; what is left over of a policy is left out. All else has to fit. Positions fit where
    there are too many, and in such a training where there are too few. Each of these is one line in the log.

    Args:
        model: a model
        state_dict: its weights
        parts: names of parts for which that holds whenever weights are loaded

    Raises:
        UsageError: for too few positions
    """
    own, anew = model.state_dict(), begins_anew()
    _fit_positions(model, own, state_dict, anew)
    parts = {*parts, *(POLICY_PARTS if anew else ())}
    other = [
        name
        for name, tensor in own.items()
        if anew and _part(name, POLICY_PARTS) and name in state_dict and state_dict[name].shape != tensor.shape
    ]
    new = [*(name for name in own if name not in state_dict and _part(name, parts)), *other]
    moved = {f"{name}.shift" for name, each in model.named_modules() if isinstance(each, Shifted)}  # comes when loaded
    left = [name for name in state_dict if name not in own and name not in moved and _part(name, parts)]
    if new:
        logger.info("initialised afresh, since the checkpoint lacks them or has others: %s", _named(new, parts))
    if left:
        logger.info("left out, since this model lacks them: %s", _named(left, parts))
    for name in left:
        del state_dict[name]
    state_dict.update({name: own[name] for name in new})


def _part(name, parts):
    return next((each for each in name.split(".") if each in parts), None)


def _named(names, parts):
    """``encoder.layers.router``, once, for all of a router's parameters; layers have no number."""
    found = {}
    for name in names:
        above = name.split(".")
        above = above[: above.index(_part(name, parts)) + 1]
        found[".".join(each for each in above if not each.isdigit())] = None
    return ", ".join(found)


def _fit_positions(model, own, state_dict, anew):
    for name in [name for name in own if name.endswith(_END) and name in state_dict]:
        theirs, ours = state_dict[name], own[name]
        if theirs.shape[1:] != ours.shape[1:] or len(theirs) == len(ours):
            continue
        table = model.get_submodule(name.rpartition(".")[0])
        padding = table.padding_idx + 1 if isinstance(table, LearnedPositionalEmbedding) else 0
        known, wanted, flag = len(theirs) - padding, len(ours) - padding, _flag(model, name)
        if known > wanted:
            logger.info("of %d positions in the checkpoint, %s %d are taken", known, flag, wanted)
            state_dict[name] = theirs[: len(ours)]
        elif anew:
            logger.warning("the checkpoint has %d positions: those up to %s %d start afresh", known, flag, wanted)
            state_dict[name] = ours.clone()
            state_dict[name][: len(theirs)] = theirs
        else:
            raise UsageError(
                f"{flag} {wanted} is more than the checkpoint has positions for: {known}. Train the others with "
                "--finetune-from-model"
            )


def _flag(model, name):
    if not hasattr(model, "decoder"):
        return "--max-positions"
    return "--max-source-positions" if name.startswith("encoder.") else "--max-target-positions"


class ExplainsLoading:
    """Mixin for models: weights that do not fit are refused in one sentence.

    Attributes:
        may_lack: parts that checkpoints of other models lack or have for themselves; see
            :func:`~fairseq_adaptive.models.fitting.fit_weights`
    """

    may_lack = ()

    def upgrade_state_dict_named(self, state_dict, name):
        super().upgrade_state_dict_named(state_dict, name)
        if not name:
            fit_weights(self, state_dict, self.may_lack)
        return state_dict

    def load_state_dict(self, state_dict, strict=True, model_cfg=None, args=None):
        try:
            return super().load_state_dict(state_dict, strict=strict, model_cfg=model_cfg, args=args)
        except RuntimeError as error:
            first = " ".join(str(error).split()[:40])
            raise UsageError(f"the checkpoint is of another architecture: {first} ...") from error

"""One dial: a trained model at a share of its counterpart's multiply-adds, as a report measures them."""

import json
from typing import Any, Dict, List, NamedTuple, Tuple

import torch

from fairseq_adaptive.criterions.controller import TOLERANCE
from fairseq_adaptive.criterions.decisions import Decision, decisions
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.interop.checkpoint import load_checkpoint, save_checkpoint
from fairseq_adaptive.modules.policies.shift import Shifted
from fairseq_adaptive.report.evaluated import Evaluated

STEPS, CLOSE = 16, 0.003  # of the search; how close, in shares of the target, ends it


class Dialled(NamedTuple):
    """Where a dial stands.

    Attributes:
        share: multiply-adds of the model by those of its counterpart
        flags: that say so, of each side; of ``..._args`` those arguments that are new
        kind: of the policies that were turned
        policies: that were turned
        reach: the least and the greatest share that they can be turned to
    """

    share: float
    flags: Dict[str, Dict[str, Any]]
    kind: str
    policies: List[str]
    reach: Tuple[float, float]


def turn_to(evaluated: Evaluated, compute: float) -> Dialled:
    """Turn the policies of a model until it spends ``compute`` of its counterpart's multiply-adds on what it is measured on.

    Routers are turned, all together; in a model without, the halting rules; and a tape where there is nothing else.

    Args:
        evaluated: the model and its data; the model is changed
        compute: share, above 0; with a tape alone it is above 1

    Raises:
        UsageError: for a model without a policy that can be turned, with what would give it one, and for a share that is
            not reached within 3%
    """
    found, dense = _turned(evaluated.model), None
    with evaluated.counterpart():
        dense = evaluated.costs().total()

    def share(position):
        for each in found:
            each.policy.turn(position, each.side == "decoder")
        return evaluated.costs().total() / dense

    near, far = 0.0, 1.0
    reach, best = (share(near), share(far)), None
    labels = [each.label for each in found]
    if not reach[0] * (1 - TOLERANCE) <= compute <= reach[1] * (1 + TOLERANCE):
        raise UsageError(
            f"--compute {compute:g} is out of reach: turned from end to end, {', '.join(labels)} spends {reach[0]:.3f} to "
            f"{reach[1]:.3f} of the counterpart's multiply-adds; take a share between, or train with --compute"
        )
    for _ in range(STEPS):
        middle = (near + far) / 2
        spent = share(middle)
        if best is None or abs(spent - compute) < abs(best[1] - compute):
            best = middle, spent
        if abs(spent / compute - 1) <= CLOSE:
            break
        near, far = (middle, far) if spent < compute else (near, middle)
    position, spent = min((best, (0.0, reach[0]), (1.0, reach[1])), key=lambda each: abs(each[1] - compute))
    if abs(spent / compute - 1) > TOLERANCE:
        raise UsageError(
            f"--compute {compute:g} falls between two steps of {', '.join(labels)}, of which the nearer spends {spent:.3f} of "
            "the counterpart's multiply-adds: take that, or measure on more texts"
        )
    flags = {each.side: each.policy.turn(position, each.side == "decoder") for each in found}
    return Dialled(spent, flags, found[0].policy.kind, labels, reach)


def _turned(model) -> List[Decision]:
    """What is turned: routers where there are any that can be, else halting rules, else readers."""
    every, refusals = decisions(model), {}
    for kind in ("router", "halting", "reader"):
        found = []
        for each in (each for each in every if each.policy.kind == kind):
            try:
                each.policy.turn(1.0)
                found.append(each)
            except UsageError as error:
                refusals[each.label] = str(error)
        if found:
            return found
    if refusals:
        raise UsageError("--compute: " + "; ".join(refusals.values()))
    raise UsageError(
        "--compute needs a policy that leaves tokens out: train with --router skimming or --halting act, or exit by "
        "confidence, --halting saturation; of a search, fairseq-adaptive derive --compute finds the layout"
    )


def write_dialled(path, output, dialled: Dialled, model) -> Dict[str, Any]:
    """Write a checkpoint as it was, with the flags and thresholds of a dial.

    Args:
        path: of the checkpoint
        output: the new file
        dialled: of :func:`turn_to`
        model: that was turned

    Returns:
        the flags that have changed, and their values

    Raises:
        UsageError: where ``output`` exists or cannot be written
    """
    state = load_checkpoint(path)
    options = state["cfg"]["model"]
    options = options if isinstance(options, dict) else vars(options)
    changed: Dict[str, Any] = {}
    known = getattr(type(model), "__dataclass").__dataclass_fields__
    for side, flags in dialled.flags.items():
        for name, value in flags.items():
            own = f"{side}_{name}"
            if isinstance(value, dict):
                shared = options.get(f"{side}_{dialled.kind}") is None  # else common arguments are of another policy
                given = options.get(own) or (options.get(name) if shared else None)
                changed[own if own in known else name] = json.dumps({**json.loads(given or "{}"), **value})
                continue
            changed[name] = value
            if options.get(own) is not None:
                changed[own] = value
    options.update(changed)
    shifts = {f"{name}.shift": each.shift for name, each in model.named_modules() if isinstance(each, Shifted)}
    for name, shift in shifts.items():
        state["model"].pop(name, None)
        if shift is not None:
            state["model"][name] = torch.clone(shift)
    save_checkpoint(state, output)
    return changed

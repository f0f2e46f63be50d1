"""What trained models spend, where, and how good they are, side by side: the numbers of ``fairseq-adaptive report``."""

import os
from typing import Any, Dict, List, Optional

import torch

from fairseq_adaptive import __version__
from fairseq_adaptive.report.costs import PARTS, Costs, parameters
from fairseq_adaptive.report.evaluated import Evaluated
from fairseq_adaptive.report.timing import measure


def compute_report(
    checkpoints: List[str],
    data: Optional[str] = None,
    subset: str = "valid",
    batch_size: int = 8,
    texts: int = 256,
    rounds: int = 5,
    quality: bool = True,
    device: str = "cpu",
) -> Dict[str, Any]:
    """Measure checkpoints, all on the same data.

    Multiply-adds are counted on the CPU, where torch sees every matrix product; they do not depend on the device.

    Args:
        checkpoints: files
        data, subset, batch_size, texts: of :class:`~fairseq_adaptive.report.evaluated.Evaluated`
        rounds: how often all are timed in turn
        quality: evaluate the whole subset
        device: where times, memory and quality are measured

    Returns:
        what is written as JSON: how it was measured, and ``models``, see :func:`describe`

    Raises:
        UsageError: for a file that is no checkpoint, and for data that do not fit
    """
    models = [Evaluated(path, data, subset, batch_size, texts) for path in checkpoints]
    described = [describe(each) for each in models]
    models = [each.to(device) for each in models]
    for each, about, results in zip(models, described, measure(models, rounds)):
        for where, (seconds, peak) in zip((about, about["counterpart"]), results):
            where["seconds"], where["peak_memory_bytes"] = seconds, peak
        about["quality"] = each.quality() if quality else None
    return {
        "fairseq_adaptive": __version__,
        "torch": torch.__version__,
        "device": device,
        "threads": torch.get_num_threads(),
        "data": data,
        "subset": subset,
        "batch_size": batch_size,
        "rounds": rounds,
        "models": described,
    }


def describe(evaluated: Evaluated) -> Dict[str, Any]:
    """What a model has and spends, without time: names, ``parameters``, ``texts`` and ``tokens`` that it was measured on,
    ``multiply_adds`` of all of them by part, ``stacks``, and the same of its ``counterpart``, None without policies."""
    costs, shares = evaluated.costs(), evaluated.shares()
    unique, used = parameters(evaluated.model)
    counterpart = None
    if evaluated.has_counterpart:
        with evaluated.counterpart():
            dense = evaluated.costs()
        counterpart = {"multiply_adds": by_part(dense)}
    stacks = {}
    for name, found in shares.items():
        rows = []
        for depth, row in enumerate(found["depths"]):
            spent = {part: costs.total(part, name, depth) for part in PARTS[1:4]}
            row = {"depth": depth, **row, "multiply_adds": {"total": sum(spent.values()), **spent}}
            if counterpart is not None:
                row["counterpart_multiply_adds"] = dense.total(stack=name, depth=depth)
            rows.append(row)
        stacks[name] = {"mean_depth": found["mean_depth"], "depths": rows}
    cfg = evaluated.cfg
    return {
        "checkpoint": os.fspath(evaluated.path),
        "architecture": _name(cfg.model),
        "task": _name(cfg.task),
        "criterion": _name(cfg.criterion),
        "parameters": {"unique": unique, "used": used},
        "texts": evaluated.texts,
        "tokens": int(evaluated.tokens),
        "multiply_adds": by_part(costs),
        "stacks": stacks,
        "counterpart": counterpart,
    }


def by_part(costs: Costs) -> Dict[str, float]:
    """The sums of all parts, and their total."""
    return {"total": costs.total(), **{part: costs.total(part) for part in PARTS}}


def _name(cfg) -> str:
    """What a part of a configuration is called."""
    return str(getattr(cfg, "_name", None) or getattr(cfg, "arch", None) or "")

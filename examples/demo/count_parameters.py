#!/usr/bin/env python3
"""Counts the parameters of a shared_transformer checkpoint, and those of fairseq's own Transformer of equal depth."""

import argparse
import copy
import logging

# fairseq names absent optional packages when it is imported
logging.disable(logging.INFO)

from fairseq import checkpoint_utils  # noqa: E402

import fairseq_adaptive.plugin  # noqa: E402,F401  registers the model
from fairseq_adaptive.command import run  # noqa: E402


def count_parameters(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    args = parser.parse_args()
    (model,), cfg, task = checkpoint_utils.load_model_ensemble_and_task([args.checkpoint])
    counterpart = copy.deepcopy(cfg["model"])
    counterpart.arch = counterpart._name = "transformer"
    shared, unshared = count_parameters(model), count_parameters(task.build_model(counterpart))
    print(
        f"{shared:,} parameters; fairseq's own Transformer of the same depth and width has {unshared:,}: "
        f"{1 - shared / unshared:.0%} fewer"
    )


if __name__ == "__main__":
    run(main)

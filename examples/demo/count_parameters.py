#!/usr/bin/env python3
"""Counts the parameters of a shared_transformer checkpoint, and those of fairseq's own Transformer of equal depth."""

import argparse
import copy
import logging

# fairseq names absent optional packages when it is imported
logging.disable(logging.INFO)

from fairseq import checkpoint_utils, tasks  # noqa: E402

import fairseq_adaptive  # noqa: E402,F401  registers the model
from fairseq_adaptive.command import run


def count_parameters(cfg, task) -> int:
    return sum(parameter.numel() for parameter in task.build_model(cfg).parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    args = parser.parse_args()
    cfg = checkpoint_utils.load_checkpoint_to_cpu(args.checkpoint)["cfg"]
    task = tasks.setup_task(cfg["task"])
    twin = copy.deepcopy(cfg["model"])
    twin.arch = twin._name = "transformer"
    shared, unshared = count_parameters(cfg["model"], task), count_parameters(twin, task)
    print(f"{shared:,} parameters; fairseq's own Transformer of the same depth and width has {unshared:,}: "
          f"{1 - shared / unshared:.0%} fewer")


if __name__ == "__main__":
    run(main)

#!/usr/bin/env python3
"""The same as ``fairseq-adaptive plot tape``."""

from fairseq_adaptive.command import run
from fairseq_adaptive.commands.plot_tape import main

if __name__ == "__main__":
    run(main)

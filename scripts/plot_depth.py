#!/usr/bin/env python3
"""The same as ``fairseq-adaptive plot depth``."""

from fairseq_adaptive.command import run
from fairseq_adaptive.commands.plot_depth import main

if __name__ == "__main__":
    run(main)

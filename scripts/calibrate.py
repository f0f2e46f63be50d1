#!/usr/bin/env python3
"""The same as ``fairseq-adaptive calibrate``."""

from fairseq_adaptive.command import run
from fairseq_adaptive.commands.calibrate import main

if __name__ == "__main__":
    run(main)

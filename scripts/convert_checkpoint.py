#!/usr/bin/env python3
"""The same as ``fairseq-adaptive convert``."""

from fairseq_adaptive.command import run
from fairseq_adaptive.commands.convert import main

if __name__ == "__main__":
    run(main)

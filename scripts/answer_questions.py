#!/usr/bin/env python3
"""The same as ``fairseq-adaptive answer``."""

from fairseq_adaptive.command import run
from fairseq_adaptive.commands.answer import main

if __name__ == "__main__":
    run(main)

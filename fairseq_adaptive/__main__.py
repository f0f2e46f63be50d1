"""``python -m fairseq_adaptive COMMAND``: the same as ``fairseq-adaptive COMMAND``."""

from fairseq_adaptive.command import run
from fairseq_adaptive.commands import main

if __name__ == "__main__":
    run(lambda: main(prog="python -m fairseq_adaptive"))

#!/usr/bin/env python3
"""What it costs on a CPU to drop tokens and to put them back: its share of a packed run of Transkimmer, and its speed.

The run is that of skimming.py. What moves tokens is ``index_select``, ``index_copy_``, ``index`` and ``nonzero``: all
calls of them in a run are made once more, on their own. Their speed is that of half of the rows, taken from and put to
random places, beside a copy of as many.
"""

import argparse
import statistics

import torch
from common import describe
from record import CLOCKS, add_json, in_turn, median, ratios
from skimming import build, plan
from torch.utils._python_dispatch import TorchDispatchMode

from fairseq_adaptive.command import run
from fairseq_adaptive.modules.layers.prepacked_linear import constant_weights
from fairseq_adaptive.ranges import BATCH, POSITIONS, ROUNDS, SHARE, Parser

PROCESSOR = CLOCKS[1]  # what is printed
MOVES = ("index_select", "index_copy_", "index", "nonzero")


class Moves(TorchDispatchMode):
    """The calls that move tokens."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in MOVES:
            self.calls.append((function, args, kwargs or {}))
        return function(*args, **(kwargs or {}))


@torch.no_grad()
@constant_weights()
def shares(args, record):
    """Print the share of the moves in the time of a packed run, for each share of tokens that stays."""
    ours, model = build(args)
    tokens = torch.randint(4, 1000, (args.batch, args.lengths[-1]))
    for kept in args.kept:
        plan(model.encoder.sentence_encoder.layers.router, kept, *tokens.shape)
        ours(tokens)
        with Moves() as moves:
            ours(tokens)

        def move():
            for function, operands, settings in moves.calls:
                function(*operands, **settings)

        times = in_turn({"moves of tokens": move, "run": lambda: ours(tokens)}, args.rounds)
        rounds = ratios(times["moves of tokens"], times["run"], PROCESSOR)
        record.add(f"{args.batch} x {args.lengths[-1]}, {kept:.1f} kept", times, share=statistics.median(rounds))
        print(
            f"{kept:.1f} of the tokens kept: {statistics.median(rounds):.2%} of the time in {len(moves.calls)} moves "
            f"(rounds {min(rounds):.2%} to {max(rounds):.2%})"
        )


def speed(args, record, rows=16384, width=384, calls=10):
    """Print how fast half of the rows are taken and put back, beside a copy of as many."""
    x, half = torch.randn(rows, width), torch.randperm(rows)[: rows // 2].sort().values
    into, taken, source = x.clone(), x.index_select(0, half), torch.randn(len(half), width)
    ways = {
        "copy": lambda: taken.copy_(source),
        "index_select": lambda: torch.index_select(x, 0, half, out=taken),
        "index_copy_": lambda: into.index_copy_(0, half, source),
    }

    repeated = {name: lambda way=way: [way() for _ in range(calls)] for name, way in ways.items()}
    times = in_turn(repeated, args.rounds, warm=1)
    times = {name: [each.per(calls) for each in measured] for name, measured in times.items()}
    record.add(f"{len(half)} rows of {width}", times, "copy", bytes=2 * source.nbytes)
    for name in ways:
        seconds = median(times[name], PROCESSOR)
        of_copy = statistics.median(ratios(times["copy"], times[name], PROCESSOR))
        moved = 2 * source.nbytes / seconds / 1e9
        print(f"{len(half)} rows of {width}: {name} {moved:.1f} GB/s, {of_copy:.2f} of a copy's")


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--arch", default="transkimmer_minilm_l6")
    parser.add_argument("--batch", type=BATCH, default=8)
    parser.add_argument("--lengths", type=POSITIONS, nargs=1, default=[128], help="of every text")
    parser.add_argument("--kept", type=SHARE, nargs="+", default=[0.2, 0.5], help="mean shares of tokens that stay")
    parser.add_argument("--rounds", type=ROUNDS, default=7)
    add_json(parser)
    args = parser.parse_args()
    record = describe(args)
    shares(args, record)
    speed(args, record)
    record.write()


if __name__ == "__main__":
    run(main)

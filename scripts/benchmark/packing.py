#!/usr/bin/env python3
"""What it costs on a CPU to drop tokens and to put them back: its share of a packed run of Transkimmer, and its speed.

The run is that of skimming.py. What moves tokens is ``index_select``, ``index_copy_``, ``index`` and ``nonzero``, whose
share is that of the profile. Their speed is that of half of the rows, taken from and put to random places, beside a
copy of as many.
"""

import argparse
import statistics
import time

import torch
from common import describe
from skimming import build, plan
from torch.profiler import ProfilerActivity, profile

MOVES = ("index_select", "index_copy_", "index", "nonzero")


def shares(args):
    """Print the share of the moves in the time of a packed run, for each share of tokens that stays."""
    ours, model = build(args)
    tokens = torch.randint(4, 1000, (args.batch, args.lengths[-1]))
    for kept in args.kept:
        plan(model.encoder.sentence_encoder.layers.router, kept, *tokens.shape)
        with torch.no_grad():
            ours(tokens)
            with profile(activities=[ProfilerActivity.CPU]) as profiled:
                for _ in range(args.rounds):
                    ours(tokens)
        spent = {each.key.removeprefix("aten::"): each.self_cpu_time_total for each in profiled.key_averages()}
        moves = {name: spent.get(name, 0) / sum(spent.values()) for name in MOVES}
        print(f"{kept:.1f} of the tokens kept: {sum(moves.values()):.2%} of the time, "
              + ", ".join(f"{name} {share:.2%}" for name, share in moves.items()))


def speed(args, rows=16384, width=384, calls=10):
    """Print how fast half of the rows are taken and put back, beside a copy of as many."""
    x, half = torch.randn(rows, width), torch.randperm(rows)[: rows // 2].sort().values
    into, taken, source = x.clone(), x.index_select(0, half), torch.randn(len(half), width)
    ways = {
        "copy": lambda: taken.copy_(source),
        "index_select": lambda: torch.index_select(x, 0, half, out=taken),
        "index_copy_": lambda: into.index_copy_(0, half, source),
    }

    def measure(way):
        start = time.process_time()
        for _ in range(calls):
            way()
        return time.process_time() - start

    rounds = [{name: measure(way) for name, way in ways.items()} for _ in range(args.rounds + 1)][1:]
    for name in ways:
        seconds = statistics.median(each[name] for each in rounds) / calls
        of_copy = statistics.median(each["copy"] / each[name] for each in rounds)
        moved = 2 * source.nbytes / seconds / 1e9
        print(f"{len(half)} rows of {width}: {name} {moved:.1f} GB/s, {of_copy:.2f} of a copy's")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--arch", default="transkimmer_minilm_l6")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lengths", type=int, nargs=1, default=[128], help="of every text")
    parser.add_argument("--kept", type=float, nargs="+", default=[0.2, 0.5], help="mean shares of tokens that stay")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    describe(args)
    shares(args)
    speed(args)


if __name__ == "__main__":
    main()

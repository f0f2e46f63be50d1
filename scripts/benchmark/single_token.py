#!/usr/bin/env python3
"""One token at a time through a Transformer-XL: without a halting rule, with ACT that never halts, and that halts half-way.

All have the same random weights, and the same cached memory. ACT is asked after every feed-forward block. Its unit says the same
of every token, so that all stop at the same depth. The output layer is left out.
"""

import argparse
import logging
import math
import statistics
from types import SimpleNamespace

import torch
from common import describe
from fairseq.data import Dictionary
from record import CLOCKS, add_json, median, ratios, spent

from fairseq_adaptive.command import run
from fairseq_adaptive.models.defaults import with_defaults
from fairseq_adaptive.models.par_transformer_xl import PARTransformerXLConfig, PARTransformerXLModel
from fairseq_adaptive.modules.layers.prepacked_linear import constant_weights
from fairseq_adaptive.ranges import BATCH, FFN_WIDTH, HEADS, LAYERS, POSITIONS, ROUNDS, WIDTH, Parser

NEVER = -20.0  # bias of a unit whose probabilities never add up to the threshold


logging.disable(logging.WARNING)  # it feeds no segments, which the model minds


def build(args, halting, bias=0.0):
    flags = SimpleNamespace(
        decoder_embed_dim=args.embed_dim,
        decoder_ffn_embed_dim=args.ffn_embed_dim,
        decoder_attention_heads=args.attention_heads,
        layout=f"af*{args.pairs}",
        memory_length=args.memory,
        tokens_per_sample=args.memory,
        halting=halting,
        halting_threshold=0.99 if halting else None,
    )
    words = Dictionary()
    words.add_symbol("word")
    torch.manual_seed(1)
    task = SimpleNamespace(source_dictionary=words, target_dictionary=words, dictionary=words)
    model = PARTransformerXLModel.build_model(with_defaults(flags, PARTransformerXLConfig), task)
    if halting:
        unit = model.decoder.blocks.halting.unit
        torch.nn.init.zeros_(unit.weight), torch.nn.init.constant_(unit.bias, bias)
    return model.eval().requires_grad_(False)


def measure(model, tokens, count):
    """Seconds of a step behind a memory; B x T tokens."""
    state = {}
    model.decoder(tokens, incremental_state=state, features_only=True)

    def steps():
        longer = tokens
        for _ in range(count):
            longer = torch.cat((longer, tokens[:, :1]), 1)
            model.decoder(longer, incremental_state=state, features_only=True)

    return spent(steps).per(count)


@constant_weights()  # as in fairseq-eval-lm
def main():
    parser = Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--pairs", type=LAYERS, default=8, help="of an attention and a feed-forward block")
    parser.add_argument("--embed-dim", type=WIDTH, default=256)
    parser.add_argument("--ffn-embed-dim", type=FFN_WIDTH, default=1024)
    parser.add_argument("--attention-heads", type=HEADS, default=4)
    parser.add_argument("--memory", type=POSITIONS, default=128)
    parser.add_argument("--batch-sizes", type=BATCH, nargs="+", default=[1, 32])
    parser.add_argument("--steps", type=POSITIONS, default=32, help="of a round")
    parser.add_argument("--rounds", type=ROUNDS, default=7, help="how often all are measured in turn")
    parser.add_argument("--processor-time", action="store_true", help="leave out the time that other processes take")
    add_json(parser)
    args = parser.parse_args()
    record, by = describe(args), CLOCKS[args.processor_time]
    share = 1.01 / (args.pairs // 2)  # of the threshold, at each pair
    models = {
        "no rule": build(args, None),
        "ACT, never": build(args, "act", NEVER),
        "ACT, half-way": build(args, "act", math.log(share / (1 - share))),
    }
    for batch in args.batch_sizes:
        torch.manual_seed(2)
        tokens = torch.full((batch, args.memory), 4)
        times = {name: [] for name in models}
        for count in range(args.rounds + 1):
            for name, model in models.items():
                found = measure(model, tokens, args.steps)
                times[name] += [found] if count else []  # the first round warms up
        base = times["no rule"]
        for name, found in times.items():
            of_base = ratios(found, base, by)
            print(
                f"batch {batch}, {name}: {1e3 * median(found, by):.2f} ms a step, {statistics.median(of_base):.2f} of no rule "
                f"(rounds {of_base[0]:.2f} to {of_base[-1]:.2f})",
                flush=True,
            )
        record.add(f"a step, batch {batch}", times, "no rule")
    record.write()


if __name__ == "__main__":
    run(torch.no_grad()(main))

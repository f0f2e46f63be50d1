#!/usr/bin/env python3
"""Inference that computes live tape tokens only, against all of them with a mask: images/s and FLOPs of adatape_vit.

The weights are random; --sharpness sets how certain the reading is, and so how long tapes are.
"""

import argparse
import statistics
from types import SimpleNamespace

import torch
from common import describe
from fairseq.models import ARCH_CONFIG_REGISTRY
from record import add_json, in_turn, median, ratios
from torch.utils.flop_counter import FlopCounterMode

from fairseq_adaptive.command import run
from fairseq_adaptive.models.adatape_vit import AdaTapeViT, AdaTapeViTConfig
from fairseq_adaptive.modules.layers.prepacked_linear import constant_weights
from fairseq_adaptive.ranges import BATCH, POSITIVE, ROUNDS, WIDTH, Parser


@constant_weights()
def main():
    parser = Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--arch", default="adatape_vit_s16", help="an architecture of adatape_vit")
    parser.add_argument("--image-size", type=WIDTH, default=64)
    parser.add_argument("--batch-size", type=BATCH, default=64)
    parser.add_argument("--sharpness", type=POSITIVE, default=1.5, help="scale of the normalised bank and query")
    parser.add_argument("--rounds", type=ROUNDS, default=7, help="how often the two are measured in turn")
    add_json(parser)
    args = parser.parse_args()
    record = describe(args)

    flags = SimpleNamespace()
    ARCH_CONFIG_REGISTRY[args.arch](flags)
    flags.tape_allow_exhausted = True
    torch.manual_seed(1)
    task = SimpleNamespace(image_size=(args.image_size, args.image_size), channels=3, classes=range(1000))
    model = AdaTapeViT.build_model(AdaTapeViTConfig(**vars(flags)), task).eval().requires_grad_(False)
    model.tape.reader.norm.weight.fill_(args.sharpness)
    torch.nn.init.normal_(model.output_projection.weight, std=0.02)
    images = torch.randn(args.batch_size, 3, args.image_size, args.image_size)

    def run(packed):
        # the masked path is that of training, which the model takes where gradients could be asked for
        with torch.set_grad_enabled(not packed):
            return model(images)

    flops, ways = {}, {"all tape tokens": lambda: run(False), "live ones": lambda: run(True)}
    for name, way in ways.items():
        with FlopCounterMode(display=False) as counter:
            way()
        flops[name] = counter.get_total_flops()
    times = in_turn(ways, args.rounds)
    dense, packed = map(median, times.values())
    faster, (more, fewer) = ratios(*times.values()), flops.values()
    reading = run(True)[1]["tape"]
    lengths = reading.live.sum(1)
    difference = (run(True)[0] - run(False)[0]).abs().max()
    print(f"{model.embedding.count} patches, tape of {lengths.float().mean():.2f} on average, {lengths.max()} at most")
    print(
        f"images/s: all tape tokens {args.batch_size / dense:.1f}, live ones {args.batch_size / packed:.1f}, "
        f"{statistics.median(faster):.3f} times as fast (rounds {faster[0]:.3f} to {faster[-1]:.3f})"
    )
    print(f"FLOPs: {more / fewer:.3f} times as many; largest difference of a logit {difference:.1e}")
    record.add(f"{args.batch_size} images", times, "all tape tokens", flops=flops, tape=float(lengths.float().mean()))
    record.write()


if __name__ == "__main__":
    run(main)

#!/usr/bin/env python3
"""Inference that computes live tape tokens only, against all of them with a mask: images/s and FLOPs of adatape_vit.

The weights are random; --sharpness sets how certain the reading is, and so how long tapes are.
"""

import argparse
import statistics
import time
from types import SimpleNamespace

import torch
from common import describe
from fairseq.models import ARCH_CONFIG_REGISTRY
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
    args = parser.parse_args()
    describe(args)

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

    flops, seconds = [], ([], [])
    for packed in (False, True):
        with FlopCounterMode(display=False) as counter:
            run(packed)
        flops.append(counter.get_total_flops())
    for _ in range(args.rounds):
        for packed in (False, True):
            start = time.perf_counter()
            run(packed)
            seconds[packed].append(time.perf_counter() - start)
    dense, packed = (statistics.median(times) for times in seconds)
    ratios = sorted(slow / fast for slow, fast in zip(*seconds))
    reading = run(True)[1]["tape"]
    lengths = reading.live.sum(1)
    difference = (run(True)[0] - run(False)[0]).abs().max()
    print(f"{model.embedding.count} patches, tape of {lengths.float().mean():.2f} on average, {lengths.max()} at most")
    print(
        f"images/s: all tape tokens {args.batch_size / dense:.1f}, live ones {args.batch_size / packed:.1f}, "
        f"{statistics.median(ratios):.3f} times as fast (rounds {ratios[0]:.3f} to {ratios[-1]:.3f})"
    )
    print(f"FLOPs: {flops[0] / flops[1]:.3f} times as many; largest difference of a logit {difference:.1e}")


if __name__ == "__main__":
    run(main)

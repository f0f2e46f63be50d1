#!/usr/bin/env python3
"""Inference of a Vision Transformer that merges tokens, beside the same model that does not: images/s and FLOPs.

The weights are random: how many tokens are left depends on r alone.
"""

import argparse
import statistics
from types import SimpleNamespace

import torch
from common import describe
from fairseq.models import ARCH_CONFIG_REGISTRY
from record import CLOCKS, add_json, in_turn, median, ratios
from torch.utils.flop_counter import FlopCounterMode

from fairseq_adaptive.command import run
from fairseq_adaptive.models.adatape_vit import AdaTapeViT, AdaTapeViTConfig
from fairseq_adaptive.modules.layers.prepacked_linear import constant_weights
from fairseq_adaptive.ranges import BATCH, COUNT, ROUNDS, WIDTH, Parser


def build(args, **given):
    """The model with some flags in place of the preset's."""
    flags = SimpleNamespace(**given)
    ARCH_CONFIG_REGISTRY[args.arch](flags)
    torch.manual_seed(1)
    task = SimpleNamespace(image_size=(args.image_size, args.image_size), channels=3, classes=range(1000))
    return AdaTapeViT.build_model(AdaTapeViTConfig(**vars(flags)), task).eval()


@constant_weights()
@torch.no_grad()
def main():
    parser = Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--arch", default="token_merging_vit_s16", help="a preset of token merging")
    parser.add_argument(
        "--r", type=COUNT, nargs="+", default=[5, 8, 13], help="tokens that are merged before each layer"
    )
    parser.add_argument("--image-size", type=WIDTH, default=224)
    parser.add_argument("--batch-size", type=BATCH, default=8)
    parser.add_argument("--rounds", type=ROUNDS, default=7, help="how often all are measured in turn")
    add_json(parser)
    args = parser.parse_args()
    record, by = describe(args), CLOCKS[1]

    models = {"dense": build(args, router="none")}
    models.update((f"r = {r}", build(args, router_args=f'{{"r": {r}}}')) for r in args.r)
    images, flops = torch.randn(args.batch_size, 3, args.image_size, args.image_size), {}
    ways = {name: lambda model=model: model(images) for name, model in models.items()}
    for name, way in ways.items():
        with FlopCounterMode(display=False) as counter:
            way()
        flops[name] = counter.get_total_flops()
    times = in_turn(ways, args.rounds, warm=1)
    for name, measured in times.items():
        faster = ratios(times["dense"], measured, by)
        print(
            f"{name}: {args.batch_size / median(measured, by):.2f} images/s, {statistics.median(faster):.2f} times as fast "
            f"(rounds {faster[0]:.2f} to {faster[-1]:.2f}) with {flops[name] / flops['dense']:.3f} of the FLOPs"
        )
    record.add(f"{args.batch_size} images", times, "dense", flops=flops)
    record.write()


if __name__ == "__main__":
    run(main)

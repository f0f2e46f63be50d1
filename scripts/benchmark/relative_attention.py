#!/usr/bin/env python3
"""Relative attention of Transformer-XL: ours, the plain pad-and-view definition and the public code, same weights.

Times forward and backward of one block (attention, residual, layer normalisation), its peak memory, and evaluation with
and without the cache. Outputs and gradients are compared first.
"""

import argparse

import public_transformer_xl
import torch
import torch.nn.functional as F
from common import describe
from record import CLOCKS, add_json, in_turn, median, spent
from torch import nn

from fairseq_adaptive.command import device, run
from fairseq_adaptive.modules.transformer_xl.relative_attention import (
    KeyValueCache,
    RelativeAttention,
    RelativePositions,
)
from fairseq_adaptive.ranges import BATCH, DISTANCE, HEADS, POSITIONS, ROUNDS, THREADS, WIDTH, Parser


class Ours(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.attention = RelativeAttention(args.embed_dim, args.heads, args.head_dim)
        self.positions = RelativePositions(args.embed_dim)
        self.norm = nn.LayerNorm(args.embed_dim)

    def forward(self, x, memory=None, cache=None):
        """B x T x C, B x M x C to B x T x C."""
        return self.norm(x + self.attention(x, self.positions, memory, cache))


class Plain(Ours):
    """The same parameters; scores shifted by padding, projections of the whole context in one go, torch's products."""

    def __init__(self, args):
        super().__init__(args)
        for each in self.attention.modules():
            if isinstance(each, nn.Linear):
                each.__class__ = nn.Linear

    def forward(self, x, memory=None):
        own = self.attention
        source = x if memory is None else torch.cat((memory, x), 1)
        batch, length, queried = x.size(0), source.size(1), x.size(1)
        heads = own.qkv_proj(source).view(batch, length, 3, own.num_heads, own.head_dim)
        queries, keys, values = heads[:, -queried:, 0], heads[:, :, 1], heads[:, :, 2]
        distances = own.position_proj(self.positions(length, x)).view(length, own.num_heads, own.head_dim)
        content = torch.einsum("bihd,bjhd->bhij", queries + own.content_bias, keys)
        position = torch.einsum("bihd,jhd->bhij", queries + own.position_bias, distances)
        padded = F.pad(position, (1, 0)).view(batch, own.num_heads, length + 1, queried)
        scores = (content + padded[:, :, 1:].view_as(position)) * own.head_dim**-0.5
        ahead = torch.ones(queried, length, dtype=torch.bool, device=x.device).triu(1 + length - queried)
        weights = scores.masked_fill(ahead, float("-inf")).softmax(-1)
        out = torch.einsum("bhij,bjhd->bihd", weights, values).reshape(batch, queried, -1)
        return self.norm(x + own.out_proj(out))


class Public(nn.Module):
    """kimiyoung/transformer-xl, loaded from a checkout of it; T x B x C inside, the layout it was written for."""

    def __init__(self, args):
        super().__init__()
        code = public_transformer_xl.load(args.peer)
        self.attention = code.RelPartialLearnableMultiHeadAttn(args.heads, args.embed_dim, args.head_dim, 0.0)
        self.positions = code.PositionalEmbedding(args.embed_dim)
        self.content_bias = nn.Parameter(torch.zeros(args.heads, args.head_dim))
        self.position_bias = nn.Parameter(torch.zeros(args.heads, args.head_dim))

    def load(self, ours):
        with torch.no_grad():
            for name, parameter in self.renamed().items():
                parameter.copy_(dict(ours.named_parameters())[name])

    def renamed(self):
        own = self.attention
        return {
            "attention.qkv_proj.weight": own.qkv_net.weight,
            "attention.position_proj.weight": own.r_net.weight,
            "attention.out_proj.weight": own.o_net.weight,
            "attention.content_bias": self.content_bias,
            "attention.position_bias": self.position_bias,
            "norm.weight": own.layer_norm.weight,
            "norm.bias": own.layer_norm.bias,
        }

    def forward(self, x, memory=None):
        x = x.transpose(0, 1)
        memory = None if memory is None else memory.transpose(0, 1)
        queried, before = len(x), 0 if memory is None else len(memory)
        distances = torch.arange(before + queried - 1, -1, -1.0, device=x.device)
        ahead = torch.ones(queried, before + queried, dtype=torch.bool, device=x.device).triu(1 + before)[:, :, None]
        out = self.attention(x, self.positions(distances), self.content_bias, self.position_bias, ahead, memory)
        return out.transpose(0, 1)


def build(name, args):
    torch.manual_seed(1)
    ours = Ours(args)
    for parameter in ours.attention.parameters():
        nn.init.normal_(parameter, std=0.05)
    if name == "ours":
        return ours.to(args.device)
    peer = Plain(args) if name == "plain" else Public(args)
    peer.load_state_dict(ours.state_dict()) if name == "plain" else peer.load(ours)
    return peer.to(args.device)


def segment(args, batch, length, seed):
    torch.manual_seed(seed)
    # contiguous for each contender: the public code gets its rows one time step after the other
    return torch.randn(length, batch, args.embed_dim, device=args.device).transpose(0, 1).contiguous()


def training_inputs(args, name):
    x, memory = segment(args, args.batch_size, args.length, 2), segment(args, args.batch_size, args.memory, 3)
    if name == "public":
        x, memory = (each.transpose(0, 1).contiguous().transpose(0, 1) for each in (x, memory))
    return x.requires_grad_(), memory if args.memory else None


def synchronize(args):
    if args.device.startswith("cuda"):
        torch.cuda.synchronize()


def step(model, x, memory, weight):
    out = model(x, memory)
    out.backward(weight)
    return out


def peak_memory(name, model, args):
    """MiB of tensors that forward and backward hold at most, beyond weights, their gradients and inputs."""
    x, memory = training_inputs(args, name)
    step(model, x, memory, torch.ones_like(x))
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profiler:
        step(model, x, memory, torch.ones_like(x))
        synchronize(args)
    held = peak = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 2**20


def largest_difference(models, args):
    """The largest difference in outputs and in gradients, relative to the largest entry of each tensor."""
    results = []
    for name, model in models.items():
        x, memory = training_inputs(args, name)
        torch.manual_seed(4)
        out = step(model, x, memory, torch.randn(x.shape, device=args.device))
        parameters = model.renamed() if name == "public" else dict(model.named_parameters())
        grads = {each: parameters[each].grad for each in dict(models["ours"].named_parameters())}
        results.append({"out": out.detach(), "x": x.grad, **grads})
    ours = results[0]
    for name, other in zip(list(models)[1:], results[1:]):
        errors = {each: ((ours[each] - other[each]).abs().max() / other[each].abs().max()).item() for each in ours}
        out = errors.pop("out")
        worst = max(errors, key=errors.get)
        print(f"ours against {name}: outputs within {out:.1e}, gradients within {errors[worst]:.1e} ({worst})")


def time_training(models, args):
    """Seconds of forward and backward of each, in turn."""
    runs = {name: training_inputs(args, name) for name in models}
    weights = {name: torch.ones_like(x) for name, (x, _) in runs.items()}

    def both(name):
        step(models[name], *runs[name], weights[name])
        synchronize(args)

    return in_turn({name: lambda name=name: both(name) for name in models}, args.rounds, warm=1)


@torch.no_grad()
def time_evaluation(models, args, length):
    """Seconds a token of a stream read in segments of ``length`` behind a full memory."""
    batch, past = args.eval_batch_size, segment(args, args.eval_batch_size, args.eval_memory, 5)
    tokens = segment(args, batch, max(length, 32), 6)

    def read(model, cache):
        memory = past
        for part in tokens.split(length, 1):
            if cache is None:
                model(part, memory)
                memory = torch.cat((memory, part), 1)[:, -args.eval_memory :]
            else:
                model(part, cache=cache)
        synchronize(args)

    times = {name: [] for name in [*models, "ours, cached"]}
    for round_number in range(args.rounds + 1):
        for name, measured in times.items():
            model = models[name.split(",")[0]].eval()
            cache = KeyValueCache(args.eval_memory) if name.endswith("cached") else None
            if cache is not None:
                model(past, cache=cache)
                model(tokens[:, :length], cache=cache)
            seconds = spent(lambda: read(model, cache))  # noqa: B023  it is called at once
            if round_number:
                measured.append(seconds.per(batch * tokens.size(1)))
    return times


def report(title, figures, unit):
    print(f"{title}: " + ", ".join(f"{name} {value:.1f}" for name, value in figures.items()) + f" {unit}")
    ratios = ", ".join(f"{name} {value / figures['ours']:.2f}" for name, value in figures.items())
    print(f"  relative to ours: {ratios}", flush=True)


def main():
    parser = Parser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--peer", metavar="FOLDER", help="a checkout of kimiyoung/transformer-xl to measure beside")
    parser.add_argument("--length", type=POSITIONS, default=150, help="of a segment in training")
    parser.add_argument("--memory", type=DISTANCE, default=150, help="in training")
    parser.add_argument("--batch-size", type=BATCH, default=8)
    parser.add_argument("--heads", type=HEADS, default=8)
    parser.add_argument("--head-dim", type=WIDTH, default=64)
    parser.add_argument("--embed-dim", type=WIDTH, default=512)
    parser.add_argument("--eval-lengths", type=POSITIONS, nargs="+", default=[1, 64], help="of segments in evaluation")
    parser.add_argument("--eval-memory", type=DISTANCE, default=640)
    parser.add_argument("--eval-batch-size", type=BATCH, default=1)
    parser.add_argument("--rounds", type=ROUNDS, default=11, help="how often all are measured in turn")
    parser.add_argument("--processor-time", action="store_true", help="leave out the time that other processes take")
    parser.add_argument("--threads", type=THREADS, default=torch.get_num_threads())
    parser.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    add_json(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    names = ["ours", "plain"] + (["public"] if args.peer else [])
    models = {name: build(name, args) for name in names}
    record, by = describe(args), CLOCKS[args.processor_time]
    peer = "public" if args.peer else "plain"
    largest_difference(models, args)
    times = time_training(models, args)
    report("forward and backward", {name: 1e3 * median(each, by) for name, each in times.items()}, "ms")
    memory = {name: peak_memory(name, model, args) for name, model in models.items()}
    report("peak memory", memory, "MiB")
    record.add(f"forward and backward, {args.batch_size} x {args.length}", times, peer, memory_mib=memory)
    for length in args.eval_lengths:
        times = time_evaluation(models, args, length)
        report(
            f"evaluation, {length} at a time", {name: 1 / median(each, by) for name, each in times.items()}, "tokens/s"
        )
        record.add(f"a token, {length} at a time", times, peer)
    record.write()


if __name__ == "__main__":
    run(main)

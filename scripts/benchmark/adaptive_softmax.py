#!/usr/bin/env python3
"""Forward and backward pass of adaptive softmaxes: ours, fairseq's, torch's, Transformer-XL's, and the full softmax.

Targets are drawn from Zipf's law. Times are of steps one after the other, as in training. Memory is what the process
(Linux) or the CUDA allocator has at most during one more step, less what it has before: activations and gradients, but
not weights.
"""

import argparse
import ctypes
import statistics

import public_transformer_xl
import torch
import torch.nn.functional as F
from common import describe
from fairseq.modules import AdaptiveSoftmax as FairseqAdaptiveSoftmax
from record import CLOCKS, add_json, median, ratios, spent

from fairseq_adaptive.command import device, run
from fairseq_adaptive.modules.vocabulary.adaptive_softmax import AdaptiveSoftmax
from fairseq_adaptive.ranges import COUNT, DROPOUT, FACTOR, ROUNDS, WIDTH, WORDS, Parser


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--vocab-size", type=WORDS, default=60000)
    parser.add_argument("--cutoffs", default="4000,20000", help="comma separated")
    parser.add_argument("--hidden-dim", type=WIDTH, default=256)
    parser.add_argument("--factor", type=FACTOR, default=4.0, help="each cluster is this much narrower")
    parser.add_argument("--tokens", type=COUNT, default=2048)
    parser.add_argument("--label-smoothing", type=DROPOUT, default=0.0, help="for ours and the full softmax")
    parser.add_argument("--rounds", type=ROUNDS, default=7, help="how often all are measured in turn")
    parser.add_argument("--peer", metavar="FOLDER", help="a checkout of kimiyoung/transformer-xl to measure beside")
    parser.add_argument("--processor-time", action="store_true", help="leave out the time that other processes take")
    parser.add_argument("--device", type=device, default="cpu")
    add_json(parser)
    args = parser.parse_args()
    record, by = describe(args), CLOCKS[args.processor_time]
    torch.manual_seed(1)
    cutoffs = [int(cutoff) for cutoff in args.cutoffs.split(",")]
    shape = args.vocab_size, cutoffs, args.hidden_dim, args.factor
    target = torch.multinomial(1 / torch.arange(1.0, args.vocab_size + 1), args.tokens, replacement=True)
    target = target.to(args.device)
    hidden = torch.randn(args.tokens, args.hidden_dim, device=args.device, requires_grad=True)

    ours = AdaptiveSoftmax(*shape)
    fairseqs = FairseqAdaptiveSoftmax(args.vocab_size, args.hidden_dim, cutoffs, dropout=0.0, factor=args.factor)
    torchs = torch.nn.AdaptiveLogSoftmaxWithLoss(
        args.hidden_dim, args.vocab_size, cutoffs, div_value=args.factor, head_bias=True
    )
    full = torch.nn.Linear(args.hidden_dim, args.vocab_size)

    def fairseq_loss():
        pairs = zip(*fairseqs(hidden, target))
        return sum(F.cross_entropy(logits, words, reduction="sum") for logits, words in pairs if words is not None)

    def public_loss():
        return public(hidden, target).sum()

    losses = {
        "ours": (ours, lambda: ours.summed(hidden, target, args.label_smoothing)[0]),
        "fairseq": (fairseqs, fairseq_loss),
        "torch": (torchs, lambda: -torchs(hidden, target).output.sum()),
        "full softmax": (
            full,
            lambda: F.cross_entropy(full(hidden), target, reduction="sum", label_smoothing=args.label_smoothing),
        ),
    }

    if args.peer:
        public = build_public(args, ours, cutoffs)
        expected, loss = public_loss().item(), ours.summed(hidden, target)[0].item()
        print(f"loss of ours and of the public code with the same weights: {loss:.2f}, {expected:.2f}")
        if abs(loss / expected - 1) > 1e-5:
            raise SystemExit("they differ")
        losses["public"] = public, public_loss

    def step(module, loss):
        module.zero_grad()
        hidden.grad = None

        def both():
            loss().backward()
            synchronize(args.device)

        return spent(both)

    times = {name: [] for name in losses}
    for round in range(args.rounds + 1):
        for name, (module, loss) in losses.items():
            seconds = step(module.to(args.device), loss)
            if round:  # the first is for warming up
                times[name].append(seconds)
    reference, used = median(times["full softmax"], by), {}
    for name, (module, loss) in losses.items():
        module.zero_grad()
        hidden.grad = None
        start_memory(args.device)
        step(module, loss)
        seconds, memory = median(times[name], by), used_memory(args.device)
        used[name] = memory / 2**20
        compared = [f"{reference / seconds:.2f} x the full softmax"]
        if args.peer:
            ratio = statistics.median(ratios(times["public"], times[name], by))
            compared.append(f"{ratio:.2f} x the public code")
        print(f"{name}: {1000 * seconds:.1f} ms, {memory / 2**20:.0f} MiB, {', '.join(compared)}")
    case = f"{args.tokens} of {args.vocab_size} words, factor {args.factor:g}"
    record.add(case, times, "public" if args.peer else "fairseq", memory_mib=used)
    record.write()


@torch.no_grad()
def build_public(args, ours, cutoffs):
    """``ProjectedAdaptiveLogSoftmax`` with the weights of ours; its clusters stand in the reverse order in the head."""
    code = public_transformer_xl.load(args.peer)
    width, factor = args.hidden_dim, int(args.factor)
    public = code.ProjectedAdaptiveLogSoftmax(args.vocab_size, width, width, cutoffs, div_val=factor).to(args.device)
    biases = ours.bias.split([len(table) for table in ours.tables])
    for layer, table, bias in zip(public.out_layers, ours.tables, biases):
        layer.weight.copy_(table)
        layer.bias.copy_(bias)
    for mine, theirs in zip(ours.projections, public.out_projs):
        theirs.copy_(mine)
    public.cluster_weight.copy_(ours.cluster_weight.flip(0))
    public.cluster_bias.copy_(ours.cluster_bias.flip(0))
    return public


def synchronize(device):
    if device != "cpu":
        torch.cuda.synchronize(device)


def resident(field):
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith(field))


before = 0


def start_memory(device):
    global before
    synchronize(device)
    if device == "cpu":
        ctypes.CDLL(None).malloc_trim(0)  # or freed memory of the step before is used, unseen
        with open("/proc/self/clear_refs", "w") as request:
            request.write("5")  # the peak is counted from here
        before = resident("VmRSS")
    else:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)


def used_memory(device):
    return (resident("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated(device)) - before


if __name__ == "__main__":
    run(main)

#!/usr/bin/env python3
"""Training steps of a Transformer-XL: ours and the public code, same weights and text, measured in turn.

Losses and gradients are compared first, without dropout. A step is forward and backward; with Adam it is an update. The
words are drawn from Zipf's law and read segment by segment, each with the memory of those before.
"""

import argparse
import statistics
from types import SimpleNamespace

import public_transformer_xl
import torch
from common import describe
from fairseq.data import Dictionary
from record import CLOCKS, Seconds, add_json, median, ratios, spent
from torch import nn

from fairseq_adaptive.command import run
from fairseq_adaptive.models.par_transformer_xl import PARTransformerXLConfig
from fairseq_adaptive.models.segmented_decoder import SegmentedDecoder
from fairseq_adaptive.modules.transformer_xl.memory import SegmentMemory
from fairseq_adaptive.ranges import (
    BATCH,
    DISTANCE,
    DROPOUT,
    FFN_WIDTH,
    HEADS,
    LAYERS,
    POSITIONS,
    ROUNDS,
    THREADS,
    WIDTH,
    WORDS,
    Parser,
)


class Ours(nn.Module):
    def __init__(self, args):
        super().__init__()
        words = Dictionary()
        for number in range(args.vocab_size - len(words)):
            words.add_symbol(str(number), n=args.vocab_size - number)
        config = {name: field.default for name, field in PARTransformerXLConfig.__dataclass_fields__.items()}
        config.update(
            decoder_embed_dim=args.embed_dim,
            decoder_ffn_embed_dim=args.ffn_embed_dim,
            dropout=args.dropout,
            activation_dropout=args.dropout,
            decoder_attention_heads=args.heads,
            memory_length=args.memory,
            adaptive_softmax_cutoff=args.cutoffs,
            share_decoder_input_output_embed=True,
            tie_adaptive_proj=True,
        )
        self.decoder = SegmentedDecoder(SimpleNamespace(**config), words, "af" * args.layers)
        self.memory = SegmentMemory()

    def forward(self, tokens, target):
        """``[B, T]`` each; returns the summed loss."""
        features = self.decoder(tokens, memory=self.memory)[0]
        return self.decoder.adaptive_softmax.summed(features.flatten(0, 1), target.flatten())[0]

    def forget(self):
        self.memory.clear()


class Public(nn.Module):
    def __init__(self, args, ours):
        super().__init__()
        cutoffs = [int(cutoff) for cutoff in args.cutoffs.split(",")]
        self.model = public_transformer_xl.load(args.peer).MemTransformerLM(
            args.vocab_size,
            args.layers,
            args.heads,
            args.embed_dim,
            args.embed_dim // args.heads,
            args.ffn_embed_dim,
            args.dropout,
            0.0,
            cutoffs=cutoffs,
            tie_projs=[False] + [True] * len(cutoffs),
            tgt_len=args.length,
            ext_len=0,
            mem_len=args.memory,
        )
        for layer in self.model.layers:  # torch no longer takes masks of bytes
            layer.dec_attn.register_forward_pre_hook(
                lambda _, inputs, named: (inputs, {**named, "attn_mask": named["attn_mask"].bool()}), with_kwargs=True
            )
        self.memory = ()
        with torch.no_grad():
            for name, (parameter, turned) in self.renamed().items():
                weight = dict(ours.named_parameters())[name]
                parameter.copy_(weight.flip(0) if turned else weight)

    def renamed(self):
        """Our names, their parameters, and whether rows are in the reverse order there."""
        model, softmax = self.model, "decoder.adaptive_softmax."
        names = {
            "decoder.embed_tokens.tables.0": (model.word_emb.emb_layers[0].weight, False),
            f"{softmax}bias": (model.crit.out_layers[0].bias, False),
            f"{softmax}cluster_weight": (model.crit.cluster_weight, True),
            f"{softmax}cluster_bias": (model.crit.cluster_bias, True),
            "decoder.blocks.0.attention.content_bias": (model.r_w_bias, False),
            "decoder.blocks.0.attention.position_bias": (model.r_r_bias, False),
        }
        for number, layer in enumerate(model.layers):
            attention, feed_forward = layer.dec_attn, layer.pos_ff
            blocks = [f"decoder.blocks.{2 * number + part}." for part in (0, 1)]
            for name, module in (
                (f"{blocks[0]}attention.qkv_proj", attention.qkv_net),
                (f"{blocks[0]}attention.position_proj", attention.r_net),
                (f"{blocks[0]}attention.out_proj", attention.o_net),
                (f"{blocks[0]}layer_norm", attention.layer_norm),
                (f"{blocks[1]}fc1", feed_forward.CoreNet[0]),
                (f"{blocks[1]}fc2", feed_forward.CoreNet[3]),
                (f"{blocks[1]}layer_norm", feed_forward.layer_norm),
            ):
                names.update((f"{name}.{kind}", (weight, False)) for kind, weight in module.named_parameters())
        return names

    def forward(self, tokens, target):
        loss, *self.memory = self.model(tokens.t().contiguous(), target.t().contiguous(), *self.memory)
        return loss.sum()

    def forget(self):
        self.memory = ()


def text(args, segments):
    """``[B, segments T + 1]`` words, none of them fairseq's symbol for padding."""
    frequencies = 1 / torch.arange(1.0, args.vocab_size + 1)
    frequencies[1] = 0.0
    shape = args.batch_size, segments * args.length + 1
    return torch.multinomial(frequencies, shape[0] * shape[1], replacement=True).view(shape)


def segments(args, words):
    for start in range(0, words.size(1) - 1, args.length):
        yield words[:, start : start + args.length], words[:, start + 1 : start + args.length + 1]


def compare(ours, public, args, words):
    """Refuse to measure what does not compute the same."""
    for model in (ours, public):
        model.eval()
    for tokens, target in segments(args, words):
        losses = []
        for model in (ours, public):
            model.zero_grad()
            loss = model(tokens, target)
            loss.backward()
            losses.append(loss.item() / tokens.numel())
    renamed = public.renamed().items()
    theirs = {name: weight.grad.flip(0) if turned else weight.grad for name, (weight, turned) in renamed}
    mine = {name: weight.grad for name, weight in ours.named_parameters() if name in theirs}
    # norms: that one of a million ReLUs is on the other side of 0 shows in single entries
    errors = {name: ((mine[name] - grad).norm() / grad.norm()).item() for name, grad in theirs.items()}
    worst = max(errors, key=errors.get)
    print(f"loss a word: ours {losses[0]:.6f}, public {losses[1]:.6f}; gradients within {errors[worst]:.1e} ({worst})")
    if abs(losses[0] / losses[1] - 1) > 1e-5 or errors[worst] > 1e-3:
        raise SystemExit("they differ")


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--peer", metavar="FOLDER", required=True, help="a checkout of kimiyoung/transformer-xl")
    parser.add_argument("--vocab-size", type=WORDS, default=60000)
    parser.add_argument("--cutoffs", default="4000,20000", help="comma separated")
    parser.add_argument("--layers", type=LAYERS, default=4)
    parser.add_argument("--embed-dim", type=WIDTH, default=410)
    parser.add_argument("--heads", type=HEADS, default=10)
    parser.add_argument("--ffn-embed-dim", type=FFN_WIDTH, default=2100)
    parser.add_argument("--length", type=POSITIONS, default=150)
    parser.add_argument("--memory", type=DISTANCE, default=150)
    parser.add_argument("--batch-size", type=BATCH, default=4)
    parser.add_argument("--dropout", type=DROPOUT, default=0.1)
    parser.add_argument("--rounds", type=ROUNDS, default=7, help="how many segments, each read by both in turn")
    parser.add_argument("--processor-time", action="store_true", help="leave out the time that other processes take")
    parser.add_argument("--threads", type=THREADS, default=torch.get_num_threads())
    parser.add_argument("--profile", action="store_true", help="print where the time of a step of each goes")
    add_json(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    record, by = describe(args), CLOCKS[args.processor_time]
    torch.manual_seed(1)
    ours = Ours(args)
    public = Public(args, ours)
    models = {"ours": ours, "public": public}
    compare(ours, public, args, text(args, 2))
    optimizers = {name: torch.optim.Adam(model.parameters(), lr=1e-5) for name, model in models.items()}
    times = {name: [] for name in models}
    for model in models.values():
        model.train()
        model.forget()
    for number, (tokens, target) in enumerate(segments(args, text(args, args.rounds + 2))):
        for name, model in models.items():
            model.zero_grad()
            both = spent(lambda: model(tokens, target).backward())  # noqa: B023  it is called at once
            update = spent(optimizers[name].step)
            if number > 1:  # before, there is no full memory, or no state of Adam
                times[name].append((both, Seconds(*map(sum, zip(both, update)))))
    for title, column in (("forward and backward", 0), ("and Adam", 1)):
        figures = {name: [each[column] for each in values] for name, values in times.items()}
        faster = ratios(figures["public"], figures["ours"], by)
        medians = ", ".join(f"{name} {median(values, by) * 1e3:.0f}" for name, values in figures.items())
        ratio = f"{statistics.median(faster):.2f} times ours (rounds {faster[0]:.2f} to {faster[-1]:.2f})"
        print(f"{title}: {medians} ms, {ratio}")
        record.add(f"{title}, {args.batch_size} x {args.length}", figures, "public")
    record.write()
    if args.profile:
        for name, model in models.items():
            with torch.profiler.profile() as profile:
                model(tokens, target).backward()
            print(name, profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=14), sep="\n")


if __name__ == "__main__":
    run(main)

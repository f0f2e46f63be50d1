#!/usr/bin/env python3
"""The loss of a language model with shared layers where later tokens read keys and values of one of a layer's repeats.

The text is read one token at a time. After each token its keys and values of all repeats of a layer are those that the first
(or the last) repeat has made: a cache a layer instead of one a depth, in a model that was trained with one a depth (``own``).
"""

import json
import math

from fairseq_adaptive.command import run
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.files import require_new, whole_file
from fairseq_adaptive.ranges import BATCH, COUNT, Parser

ANSWERS = ("own", "first", "last")


def exchange(stack, state, answer):
    """Give all repeats of each layer the keys and values that one of them has made of the newest token.

    Args:
        stack: a stack of decoder layers without policies
        state: fairseq's incremental state, changed in place
        answer: of ANSWERS
    """
    for number in sorted(set(stack.schedule)) if answer != "own" else ():
        depths = [depth for depth, each in enumerate(stack.schedule) if each == number]
        caches = [stack[depth].self_attn._get_input_buffer(stack[depth].depth_cache(state, depth)) for depth in depths]
        read = caches[0 if answer == "first" else -1]
        for cache in caches:
            for name in ("prev_key", "prev_value"):
                cache[name][:, :, -1] = read[name][:, :, -1]


def loss(decoder, batches, answer, pad):
    """Nats of a token, over batches.

    Args:
        decoder: of a language model
        batches: fairseq's samples
        answer: of ANSWERS
        pad: number of the padding
    """
    total = count = 0
    for batch in batches:
        tokens, target, state = batch["net_input"]["src_tokens"], batch["target"], {}
        for place in range(tokens.size(1)):
            logits = decoder(tokens[:, : place + 1], incremental_state=state)[0][:, -1]
            exchange(decoder.layers, state, answer)
            there = target[:, place] != pad
            scores = logits.double().log_softmax(-1).gather(1, target[:, place : place + 1]).squeeze(1)
            total, count = total - float(scores[there].sum()), count + int(there.sum())
    return total / count


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("checkpoint", help="of a shared_transformer_lm without policies")
    parser.add_argument("--data", metavar="FOLDER", help="the binarised data (default: as in training)")
    parser.add_argument("--subset", default="test", help="which split (default: %(default)s)")
    parser.add_argument("--batch-size", type=BATCH, default=64, metavar="N", help="texts at a time (default: 64)")
    parser.add_argument("--texts", type=COUNT, default=256, metavar="N", help="how many (default: 256)")
    parser.add_argument("--output", metavar="JSON", help="write the losses, in base 2; must not exist")
    args = parser.parse_args()

    import torch

    import fairseq_adaptive.plugin  # noqa: F401  registers models
    from fairseq_adaptive.report.evaluated import Evaluated

    if args.output:
        require_new(args.output)
    evaluated = Evaluated(args.checkpoint, args.data, args.subset, args.batch_size, args.texts)
    decoder = evaluated.model.decoder
    stack = getattr(decoder, "layers", None)
    if not hasattr(stack, "schedule") or len(set(stack.schedule)) == len(stack.schedule) or stack.adaptive:
        raise UsageError(f"{args.checkpoint} is no language model with shared layers and without policies")
    pad = evaluated.task.source_dictionary.pad()
    with torch.no_grad():
        found = {answer: loss(decoder, evaluated.batches, answer, pad) / math.log(2) for answer in ANSWERS}
    for answer, each in found.items():
        print(f"{answer}\t{each:.4f} bits a token")
    if args.output:
        with whole_file(args.output) as part, open(part, "w", encoding="utf-8") as file:
            json.dump({"texts": evaluated.texts, "loss": found}, file)
        print("wrote", args.output)


if __name__ == "__main__":
    run(main)

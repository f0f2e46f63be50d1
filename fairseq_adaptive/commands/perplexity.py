"""Prints the perplexity of a language model per token, word and character, which compare between vocabularies.

The loss is that of every token of the binarised text, as in fairseq-eval-lm. Divided by the words of the raw text it
does not depend on how words were split into tokens. A word that the dictionary lacks counts as <unk>: models with and
without unknown words do not compare.
"""

import argparse
import json
import logging

from fairseq_adaptive.ranges import BATCH, DISTANCE, POSITIONS, Parser


def main(argv=None, prog=None):
    parser = Parser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="of a language model")
    parser.add_argument("data", help="folder of fairseq-preprocess --only-source")
    parser.add_argument("--raw", metavar="FILE", help="the text of this split before it was split into tokens")
    parser.add_argument(
        "--bytes",
        action="store_true",
        help="the tokens are the bytes of --raw (enwik8): report bits per byte, and count no words",
    )
    parser.add_argument("--split", default="test", help="which binarised text (default: %(default)s)")
    parser.add_argument(
        "--batch-size",
        type=BATCH,
        default=1,
        metavar="N",
        help="streams that the text is read in (default: 1, all of it in order)",
    )
    parser.add_argument(
        "--tokens-per-sample", type=POSITIONS, metavar="N", help="length of a segment (default: that of the training)"
    )
    parser.add_argument(
        "--context-window",
        type=DISTANCE,
        default=0,
        metavar="N",
        help="for models without memory: the first N tokens of each segment are only read",
    )
    parser.add_argument("--memory-length", type=DISTANCE, metavar="N", help="in place of that of the training")
    parser.add_argument("--clamp-length", type=DISTANCE, metavar="N", help="in place of that of the training")
    parser.add_argument("--same-length", action=argparse.BooleanOptionalAction, help="in place of that of the training")
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU")
    parser.add_argument("--json", action="store_true", help="print JSON, not a table")
    args = parser.parse_args(argv)
    if args.bytes and not args.raw:
        parser.error("--bytes needs --raw")

    import torch

    import fairseq_adaptive.plugin  # noqa: F401  registers tasks and models
    from fairseq_adaptive.report.perplexity import count_bytes, count_text, perplexities, score_text

    logging.disable(logging.INFO)
    names = ("memory_length", "clamp_length", "same_length")
    overrides = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    counts = (count_bytes if args.bytes else count_text)(args.raw) if args.raw else None
    device = "cuda" if torch.cuda.is_available() and not args.cpu else "cpu"
    scored = score_text(
        args.checkpoint,
        args.data,
        args.split,
        args.batch_size,
        args.tokens_per_sample,
        args.context_window,
        overrides,
        device,
    )
    table = perplexities(scored, counts)
    speed = scored.tokens / scored.seconds
    if args.json:
        print(
            json.dumps(
                {
                    "checkpoint": args.checkpoint,
                    "data": args.data,
                    "split": args.split,
                    "nll": scored.nll,
                    "lines": scored.lines,
                    "unknown": scored.unknown,
                    "tokens_per_second": speed,
                    "per": table,
                }
            )
        )
        return
    print(f"{'per':<18}{'number':>14}{'perplexity':>14}{'bits':>10}")
    for unit, row in table.items():
        print(f"{unit:<18}{row['count']:>14,}{row['perplexity']:>14.2f}{row['bits']:>10.4f}")
    print(f"{scored.unknown:,} tokens are <unk>, predicted as such; {speed:,.0f} tokens/s on {device}")

"""Shows which kinds of tokens a classifier skims, and before which layer, over raw texts: a table, and a map of it.

To see it token by token, use fairseq-adaptive predict.
"""

import logging

from fairseq_adaptive.commands.predict import WINDOW, add_text_flags, read_texts
from fairseq_adaptive.progress import progress
from fairseq_adaptive.ranges import Parser


def main(argv=None, prog=None):
    parser = Parser(prog=prog, description=__doc__)
    add_text_flags(parser)
    parser.add_argument("--output", metavar="PNG", help="the map; must not exist (default: print the table alone)")
    args = parser.parse_args(argv)

    from fairseq_adaptive.hub import TranskimmerClassifier
    from fairseq_adaptive.report.pictures import require_picture
    from fairseq_adaptive.report.skim_map import format_shares, kept_shares, plot_shares

    logging.disable(logging.INFO)
    if args.output:
        require_picture(args.output)
    texts = read_texts(args.input, args.pairs)
    classifier = TranskimmerClassifier.from_pretrained(args.checkpoint, args.data, args.tokenizer, cased=args.cased)
    window = WINDOW * args.batch_size
    parts = progress(range(0, len(texts), window), "lines")
    found = kept_shares(
        each.sentence for start in parts for each in classifier.predict(texts[start : start + window], args.batch_size)
    )
    print(format_shares(found), end="")
    if args.output:
        plot_shares(found, args.output)
        print("wrote", args.output)

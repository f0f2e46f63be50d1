"""Packs a trained model into a folder of a zoo: NAME-VERSION.tar.gz, of what inference needs alone, and its entry in zoo.json.

The archive has the same bytes whenever the same model is packed. It is read back before it has its name. What is larger
than --most, or has a field empty, is refused.
"""

import argparse
import datetime

from fairseq_adaptive.ranges import Parser, Range

MEGABYTES = Range(float, 0, 1000, above=True)


def score(text: str):
    """METRIC=NUMBER, for ``type=`` of a flag."""
    metric, sign, number = text.partition("=")
    try:
        if sign and metric.strip():
            return metric.strip(), float(number)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text[:40]!r} is no score: say METRIC=NUMBER, such as BLEU=34.1")


def main(argv=None, prog=None):
    parser = Parser(prog=prog, description=__doc__)
    parser.add_argument("checkpoint", help="or a folder of save_pretrained")
    parser.add_argument(
        "--zoo", required=True, metavar="FOLDER", help="of archives and zoo.json, which is made if needed"
    )
    parser.add_argument("--name", required=True, help="by which hub.from_pretrained finds it: letters, digits, - and _")
    parser.add_argument("--version", required=True, help="numbers with dots between them, such as 1 or 1.2")
    parser.add_argument("--trained-by", required=True, metavar="COMMAND", help="that trained it")
    parser.add_argument(
        "--score",
        required=True,
        type=score,
        nargs="+",
        metavar="METRIC=NUMBER",
        help="how good it is, such as BLEU=34.1",
    )
    parser.add_argument("--scored-by", required=True, metavar="COMMAND", help="that measured --score")
    parser.add_argument("--commit", required=True, help="of the code that trained it")
    parser.add_argument("--data", required=True, metavar="NAME", help="what it was trained on")
    parser.add_argument("--licence", required=True, metavar="NAME", help="of that data")
    parser.add_argument("--half", action="store_true", help="round the weights to float16: half the size")
    parser.add_argument(
        "--most",
        type=MEGABYTES,
        default=10,
        metavar="MB",
        help="size of the archive, in millions of bytes (default: 10)",
    )
    parser.add_argument("--data-dir", metavar="FOLDER", help="with the dictionaries (default: that of the training)")
    parser.add_argument("--tokenizer", help="moses, or the tokenizer of a classifier or reader, as the hub takes it")
    parser.add_argument("--bpe", choices=("subword_nmt", "sentencepiece"), help="of a translation or language model")
    parser.add_argument("--codes", metavar="FILE", help="of --bpe")
    args = parser.parse_args(argv)

    import logging

    import fairseq_adaptive.plugin  # noqa: F401  safe loading
    from fairseq_adaptive.hub.packing import pack

    logging.disable(logging.INFO)
    said = {each: getattr(args, each) for each in "name version trained_by scored_by commit data licence".split()}
    said |= {"score": dict(args.score), "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat()}
    options = {"data": args.data_dir, "tokenizer": args.tokenizer, "bpe": args.bpe, "codes": args.codes}
    options = {name: value for name, value in options.items() if value is not None}
    entry = pack(args.checkpoint, args.zoo, said, options, args.half, int(args.most * 1e6))
    print(f"wrote {args.zoo}/{entry.file}: {entry.bytes:,} bytes, {entry.parameters:,} parameters in {entry.weights}")

#!/usr/bin/env python3
"""Splits texts with labels, NAME.txt, into NAME.label and pieces of words, NAME.input0 and of pairs NAME.input1."""

import contextlib
import math
import os

from fairseq.data import Dictionary
from texts import read_texts

from fairseq_adaptive.command import run
from fairseq_adaptive.data.albert_tokenizer import AlbertTokenizer
from fairseq_adaptive.data.squad import cut, load_tokenizer
from fairseq_adaptive.data.text_pairs import check_vocabulary, shorten
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.files import whole_file
from fairseq_adaptive.ranges import POSITIONS, Parser


def check_label(label, regression):
    if not regression:
        return len(label.split()) == 1
    try:
        return math.isfinite(float(label))
    except ValueError:
        return False


def main():
    parser = Parser(description=__doc__)
    parser.add_argument(
        "texts",
        nargs="+",
        metavar="NAME.txt",
        help="a line is a label, a tab or a space, and a text; of pairs a label, a tab, a text, a tab and a text",
    )
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="FOLDER",
        help="folder with vocab.txt, or vocab.json and merges.txt; or a SentencePiece model, a file",
    )
    parser.add_argument("--dictionary", metavar="FILE", help="the model's dict.txt, to see that both belong together")
    parser.add_argument("--cased", action="store_true", help="vocab.txt distinguishes upper and lower case")
    parser.add_argument("--pairs", action="store_true", help="a line has two texts")
    parser.add_argument("--regression", action="store_true", help="labels are numbers")
    parser.add_argument(
        "--max-length",
        type=POSITIONS,
        default=512,
        help="cut texts off at this many tokens, with the special ones that fairseq adds (default: %(default)s)",
    )
    args = parser.parse_args()

    if os.path.isfile(args.tokenizer):
        tokenizer, double_separator = AlbertTokenizer(args.tokenizer), False
        pieces_of = tokenizer.tokenize
    else:
        tokenizer, double_separator = load_tokenizer(args.tokenizer, args.cased)
        pieces_of = lambda text: cut(tokenizer, text)[0]  # noqa: E731
    if args.dictionary:
        check_vocabulary(tokenizer, Dictionary.load(args.dictionary), args.tokenizer)
    room = args.max_length - 2 - (1 + double_separator) * args.pairs
    if room < 1:
        raise UsageError(f"--max-length {args.max_length} leaves no room for a text")
    kinds = ["label", "input0", "input1"][: 2 + args.pairs]
    for path in args.texts:
        with contextlib.ExitStack() as stack:
            files = []
            for kind in kinds:
                part = stack.enter_context(whole_file(f"{path.removesuffix('.txt')}.{kind}"))
                files.append(stack.enter_context(open(part, "w", encoding="utf-8")))
            for number, (label, *texts) in enumerate(read_texts(path, args.pairs), start=1):
                if not check_label(label, args.regression):
                    raise UsageError(
                        f"{path}, line {number}: the label {label!r} is "
                        + ("no number" if args.regression else "not one word")
                    )
                parts = shorten([*map(pieces_of, texts)], room)
                for file, line in zip(files, [label, *map(" ".join, parts)]):
                    file.write(line + "\n")


if __name__ == "__main__":
    run(main)

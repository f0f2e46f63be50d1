#!/usr/bin/env python3
"""Splits lines of a label and a text into labels and pieces of words: OUT.label and OUT.input0, a line each."""

import argparse

from fairseq_adaptive.data.squad import cut, load_tokenizer
from fairseq_adaptive.errors import UsageError


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("texts", help="a line is a label, a tab or a space, and a text")
    parser.add_argument("--tokenizer", required=True, metavar="FOLDER", help="vocab.txt, or vocab.json and merges.txt")
    parser.add_argument("--cased", action="store_true", help="vocab.txt distinguishes upper and lower case")
    parser.add_argument("--max-length", type=int, default=512, help="cut texts off at this many tokens, with the "
                        "first and the last one that fairseq adds (default: %(default)s)")
    parser.add_argument("--output", required=True, metavar="OUT", help="prefix of the two files")
    args = parser.parse_args()

    tokenizer, _ = load_tokenizer(args.tokenizer, args.cased)
    with open(args.texts, encoding="utf-8") as lines, open(args.output + ".label", "w", encoding="utf-8") as labels, \
            open(args.output + ".input0", "w", encoding="utf-8") as inputs:
        for number, line in enumerate(lines, start=1):
            parts = line.rstrip("\n").split("\t", 1) if "\t" in line else line.rstrip("\n").split(" ", 1)
            if not parts[0].strip():
                raise UsageError(f"{args.texts}, line {number}: there is no label in front of the text")
            pieces, _ = cut(tokenizer, parts[1] if len(parts) == 2 else "")
            labels.write(parts[0].strip() + "\n")
            inputs.write(" ".join(pieces[: args.max_length - 2]) + "\n")


if __name__ == "__main__":
    main()

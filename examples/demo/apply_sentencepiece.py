#!/usr/bin/env python3
"""Learns one joint SentencePiece model on a parallel training set and splits all its sets into pieces."""

import argparse
import shutil
import sys
from pathlib import Path

import sentencepiece as spm

SPLITS = ("train", "valid", "test")


def read_lines(path: Path):
    """Return the lines of a text file.

    Raises:
        ValueError: when it is no UTF-8 text, has no lines, or an empty one
    """
    try:
        lines = path.read_bytes().decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start})") from None
    if lines[-1] == "":
        lines.pop()
    if not lines:
        raise ValueError(f"{path} is empty")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise ValueError(f"line {number} of {path} is empty; remove it there and in the other language")
    return lines


def read_corpus(folder: Path, source="en", target="de"):
    """Return ``{file name: lines}`` of {train,valid,test}.{source,target}.

    Raises:
        ValueError: when a file is not readable as text, or the two languages differ in their number of lines
        OSError: when a file is missing
    """
    files = [f"{split}.{lang}" for split in SPLITS for lang in (source, target)]
    corpus = {name: read_lines(folder / name) for name in files}
    for source, target in zip(files[::2], files[1::2]):
        if len(corpus[source]) != len(corpus[target]):
            raise ValueError(
                f"{folder / source} has {len(corpus[source])} lines, {target} has {len(corpus[target])}: "
                "line n of one must be the translation of line n of the other"
            )
    return corpus


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "corpus", type=Path, help="a folder with {train,valid,test}.{SOURCE,TARGET}, one sentence a line"
    )
    parser.add_argument("out", type=Path, help="a new folder; gets these files in pieces, and sentencepiece.model")
    parser.add_argument("--source", default="en", help="one language (default: %(default)s)")
    parser.add_argument("--target", default="de", help="the other (default: %(default)s)")
    parser.add_argument("--vocab-size", type=int, default=4000, help="how many pieces at most (default: %(default)s)")
    args = parser.parse_args()
    if not 8 <= args.vocab_size <= 1 << 24:
        parser.error(f"--vocab-size is {args.vocab_size}: use a whole number from 8 to {1 << 24:,}")
    if args.out.exists():
        parser.error(f"{args.out} exists already; remove it or name another folder")
    try:
        corpus = read_corpus(args.corpus, args.source, args.target)
    except (OSError, ValueError) as error:
        sys.exit(f"apply_sentencepiece: {error}")

    partial = args.out.with_name(args.out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus[f"train.{args.source}"] + corpus[f"train.{args.target}"]),
        model_prefix=str(partial / "sentencepiece"),
        vocab_size=args.vocab_size,
        # a small corpus may have fewer pieces than were asked for
        hard_vocab_limit=False,
        character_coverage=0.9995,
        minloglevel=1,
    )
    processor = spm.SentencePieceProcessor(model_file=str(partial / "sentencepiece.model"))
    for name, lines in corpus.items():
        pieces = "".join(f"{' '.join(line)}\n" for line in processor.encode(lines, out_type=str))
        (partial / name).write_text(pieces, encoding="utf-8", newline="\n")
    partial.rename(args.out)
    words = sum(len(line.split()) for line in corpus[f"train.{args.target}"])
    pieces = sum(map(len, processor.encode(corpus[f"train.{args.target}"])))
    pairs = len(corpus[f"train.{args.source}"])
    print(f"{processor.get_piece_size()} pieces, {pieces / words:.2f} a word of {args.target}, {pairs} training pairs")


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Looks at texts with labels and at a published encoder before work starts, for own.sh: what there is, and what would fail.

Prints to the standard error what will be done; to the standard output the number of labels, the format and the architecture of
the encoder, and the number of updates, in one line.
"""

import sys
from collections import Counter
from pathlib import Path

from texts import read_texts

from fairseq_adaptive.command import run
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.files import read_json
from fairseq_adaptive.ranges import BATCH, COUNT, Parser

# format, width and layers of the encoders that have a preset
ARCHITECTURES = {
    ("bert", 384, 6): "transkimmer_minilm_l6",
    ("bert", 768, 12): "transkimmer_bert_base",
    ("roberta", 768, 12): "transkimmer_base",
    ("roberta", 1024, 24): "transkimmer_large",
}
HELD_OUT = 20  # every so manieth line of train is dev where there is none, as prepare.sh has it


def labels_of(path, pairs):
    """How often each label is there.

    Raises:
        UsageError: for what :func:`read_texts` refuses, labels of several words, lines without a text, and no line at all
    """
    labels = Counter()
    for number, (label, *texts) in enumerate(read_texts(path, pairs), start=1):
        if len(label.split()) != 1:
            raise UsageError(f"{path}, line {number}: the label {label!r} is not one word")
        if not all(text.strip() for text in texts):
            raise UsageError(f"{path}, line {number}: there is no text behind the label {label!r}")
        labels[label] += 1
    if not labels:
        raise UsageError(f"{path} is empty")
    return labels


def encoder_of(folder, named):
    """Format and architecture of an encoder.

    Raises:
        UsageError: when it has no vocabulary, or no preset and none is named
    """
    kind = "bert" if (folder / "vocab.txt").is_file() else "roberta"
    if kind == "roberta" and not all((folder / name).is_file() for name in ("vocab.json", "merges.txt")):
        raise UsageError(f"{folder} has neither vocab.txt nor vocab.json and merges.txt: name the folder of an encoder")
    config = read_json(folder / "config.json")
    size = (kind, config.get("hidden_size"), config.get("num_hidden_layers"))
    if named is None and size not in ARCHITECTURES:
        known = ", ".join(f"{kind} of {layers} layers of {width}" for kind, width, layers in ARCHITECTURES)
        raise UsageError(
            f"{folder} is a {kind} of {size[2]} layers of width {size[1]}, and there are presets for {known}: name one with "
            "--arch, and give its sizes as flags of fairseq-train"
        )
    return kind, named or ARCHITECTURES[size]


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("texts", type=Path, help="folder with train.txt, and dev.txt and test.txt if there are any")
    parser.add_argument("encoder", type=Path, help="folder of a published encoder")
    parser.add_argument("--pairs", action="store_true", help="a line has two texts")
    parser.add_argument("--arch", help="of the encoder (default: by its sizes)")
    parser.add_argument("--epochs", type=COUNT, default=3)
    parser.add_argument("--batch-size", type=BATCH, default=32)
    args = parser.parse_args()

    counts = {}
    for name in ("train", "dev", "test"):
        path = args.texts / f"{name}.txt"
        if name == "train" or path.is_file():
            counts[name] = labels_of(path, args.pairs)
    known = counts["train"]
    if "dev" not in counts:
        size = sum(known.values())
        if size < 2 * HELD_OUT:
            raise UsageError(
                f"{args.texts} has {size} texts and no dev.txt: give {2 * HELD_OUT} texts or more, or a dev.txt"
            )
    if len(known) < 2:
        raise UsageError(
            f"{args.texts / 'train.txt'} has one label, {next(iter(known))}: there is nothing to tell apart"
        )
    for name, labels in counts.items():
        strange = sorted(set(labels) - set(known))
        if strange:
            raise UsageError(
                f"{args.texts / f'{name}.txt'} has labels that train.txt has not: {', '.join(strange[:5])}"
            )
    kind, architecture = encoder_of(args.encoder, args.arch)
    size = sum(known.values())
    held = 0 if "dev" in counts else size // HELD_OUT
    updates = -(-(size - held) // args.batch_size) * args.epochs
    sizes = [
        f"{size - held} texts to train on",
        f"{sum(counts['dev'].values()) if 'dev' in counts else held} to choose by",
    ]
    sizes += [f"{sum(counts['test'].values())} to test on"] if "test" in counts else []
    print(
        f"to do: {', '.join(sizes)}; {len(known)} labels, the most frequent {known.most_common(1)[0][0]} with "
        f"{100 * known.most_common(1)[0][1] / size:.1f}%; {architecture}, dense and skimming, {updates} updates of "
        f"{args.batch_size} texts each",
        file=sys.stderr,
    )
    print(len(known), kind, architecture, updates)


if __name__ == "__main__":
    run(main)

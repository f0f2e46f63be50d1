#!/usr/bin/env python3
"""Scores a trained model on texts with labels by the metric of their task, and writes GLUE's test set submissions."""

import logging
import os
from pathlib import Path

from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from texts import NAMES, PAIRS, read_texts

from fairseq_adaptive.command import run
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.files import require_new, whole_file
from fairseq_adaptive.hub import TranskimmerClassifier
from fairseq_adaptive.ranges import BATCH, POSITIONS, Parser

METRICS = {
    "accuracy": accuracy_score,
    "F1": lambda true, found: f1_score(true, found, pos_label="1"),
    "Matthews correlation": matthews_corrcoef,
    "Pearson correlation": lambda true, found: pearsonr(true, found)[0],
    "Spearman correlation": lambda true, found: spearmanr(true, found)[0],
}
OF_TASK = {
    "CoLA": ["Matthews correlation"],
    "MRPC": ["F1", "accuracy"],
    "QQP": ["F1", "accuracy"],
    "STS-B": ["Pearson correlation", "Spearman correlation"],
}


def known(labels, classifier, path):
    if not classifier.labels:
        try:
            return [float(label) for label in labels]
        except ValueError as error:
            raise UsageError(f"{path}: {error}, but the model gives numbers") from None
    strange = next((label for label in labels if label not in classifier.labels), None)
    if strange is not None:
        raise UsageError(
            f"{path} has the label {strange!r}, which the model does not know: its labels are "
            f"{', '.join(classifier.labels)}"
        )
    return labels


def written(label):
    return label if isinstance(label, str) else f"{min(max(label, 0.0), 5.0):.3f}"  # STS-B's scale


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("task", choices=NAMES)
    parser.add_argument("texts", type=Path, help="folder that texts.py made, or any with dev.txt or test.txt")
    parser.add_argument("--path", required=True, metavar="CHECKPOINT")
    parser.add_argument("--data", metavar="FOLDER", help="the bin folder of prepare.sh (default: as in training)")
    parser.add_argument(
        "--tokenizer",
        metavar="FOLDER",
        help="with the vocabulary, or a SentencePiece model (default: that of the data)",
    )
    parser.add_argument("--cased", action="store_true", help="vocab.txt distinguishes upper and lower case")
    parser.add_argument(
        "--max-length", type=POSITIONS, metavar="N", help="as in prepare.sh (default: all that it can read)"
    )
    parser.add_argument("--batch-size", type=BATCH, default=32, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--int8", action="store_true", help="run the maps of the layers in int8, on the CPU")
    parser.add_argument(
        "--submission",
        type=Path,
        metavar="FOLDER",
        help="write the labels of GLUE's test sets there, in the files that its site takes",
    )
    args = parser.parse_args()

    logging.disable(logging.INFO)
    labelled = [path for pattern in ("dev*.txt", "test.txt") for path in sorted(args.texts.glob(pattern))]
    hidden = sorted(args.texts.glob("submission/*.txt")) if args.submission else []
    if args.submission and not hidden:
        raise UsageError(f"there is no text in {args.texts / 'submission'}: make it with texts.py")
    if not labelled and not hidden:
        raise UsageError(f"there is neither dev.txt nor test.txt in {args.texts}")
    targets = [args.submission / f"{path.stem}.tsv" for path in hidden]
    if targets:
        os.makedirs(args.submission, exist_ok=True)
    for target in targets:
        require_new(target)
    classifier = TranskimmerClassifier.from_pretrained(
        args.path, args.data, args.tokenizer, cased=args.cased, max_length=args.max_length, int8=args.int8
    )
    for path, target in [*((path, None) for path in labelled), *zip(hidden, targets)]:
        names, texts = [], []
        for name, *text in read_texts(path, args.task in PAIRS):
            names.append(name)
            texts.append(tuple(text))
        true = known(names, classifier, path) if target is None else None
        predictions = classifier.predict(texts, args.batch_size)
        found = [prediction.label for prediction in predictions]
        if target is None:
            scores = (f"{name} {100 * METRICS[name](true, found):.2f}" for name in OF_TASK.get(args.task, ["accuracy"]))
            print(f"{path.name}: {len(texts)} texts, {', '.join(scores)}", flush=True)
        else:
            with whole_file(target) as part, open(part, "w", encoding="utf-8") as file:
                file.write("index\tprediction\n")
                file.writelines(f"{name}\t{written(label)}\n" for name, label in zip(names, found))
            print("wrote", target, flush=True)


if __name__ == "__main__":
    run(main)

"""Says the label of raw texts, and shows before which layer each token was skimmed, or after how many it has halted.

A line for each line, blank ones too: the label, its probability, and the text, in a terminal coloured by layer. Reads
checkpoints that --task sentence_prediction has trained.
"""

import logging
import os
import sys

from fairseq_adaptive.command import wants_colour
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.files import read_lines, require_new, whole_file
from fairseq_adaptive.printable import printable
from fairseq_adaptive.progress import progress, say
from fairseq_adaptive.ranges import BATCH, Parser

WINDOW = 8  # batches that are sorted by length together; then their results are printed


def read_texts(path, pairs):
    texts = read_lines(path)
    if not any(text.strip() for text in texts):
        raise UsageError("there is no text to read: it is empty")
    if not pairs:
        return texts
    split = [tuple(text.split("\t")) for text in texts]
    for number, parts in enumerate(split, start=1):
        if len(parts) != 2:
            raise UsageError(f"line {number} is no pair: with --pairs a tab is between two texts, not {parts[0]!r:.60}")
    return split


def add_text_flags(parser):
    """What every command that reads texts for a classifier asks."""
    parser.add_argument("checkpoint", help="of --task sentence_prediction")
    parser.add_argument("--data", metavar="FOLDER", help="the binarised training data (default: as in training)")
    parser.add_argument(
        "--tokenizer",
        metavar="FOLDER",
        help="vocab.txt, or vocab.json and merges.txt, or spiece.model; or a SentencePiece model, a file (default: in the "
        "data, where examples/classification/prepare.sh puts them)",
    )
    parser.add_argument("--cased", action="store_true", help="vocab.txt distinguishes upper and lower case")
    parser.add_argument("--input", default="-", metavar="FILE", help="a text a line (default: standard input)")
    parser.add_argument("--pairs", action="store_true", help="a line has two texts with a tab between them")
    parser.add_argument("--batch-size", type=BATCH, default=32, metavar="N", help="lines at a time (default: 32)")


def main(argv=None, prog=None):
    parser = Parser(prog=prog, description=__doc__)
    add_text_flags(parser)
    parser.add_argument(
        "--color",
        choices=("auto", "always", "never"),
        default="auto",
        help="never: print the layer behind each token (default: colours in a terminal)",
    )
    parser.add_argument("--int8", action="store_true", help="run the maps of the layers in int8, on the CPU")
    parser.add_argument("--html", metavar="FILE", help="write the coloured texts as a page; must not exist")
    args = parser.parse_args(argv)

    from fairseq_adaptive.hub import TranskimmerClassifier
    from fairseq_adaptive.modules.layers.prepacked_linear import constant_weights
    from fairseq_adaptive.report.shading import legend, to_html, to_text

    logging.disable(logging.INFO)
    if args.html:
        require_new(args.html)
    texts = read_texts(args.input, args.pairs)
    classifier = TranskimmerClassifier.from_pretrained(
        args.checkpoint, args.data, args.tokenizer, cased=args.cased, int8=args.int8
    )
    sentences, colour = [], wants_colour(args.color)
    window = WINDOW * args.batch_size  # batches are of one length, as far as there are some at hand
    with constant_weights():
        for start in progress(range(0, len(texts), window), "lines"):
            for prediction in classifier.predict(texts[start : start + window], args.batch_size):
                sentence = prediction.sentence
                if colour and not sentences:
                    say(legend(sentence.limit, sentence.measure, sentence.last))
                sentences.append(sentence)
                head = (
                    f"{prediction.label:.3f}"
                    if not prediction.probabilities
                    else f"{printable(prediction.label)}\t{prediction.probabilities[prediction.label]:.3f}"
                )
                say(f"{head}\t{to_text(sentence, colour)}")
    if args.html:
        with whole_file(args.html) as part, open(part, "w", encoding="utf-8") as file:
            file.write(to_html(sentences, f"Skimmed by {os.path.basename(args.checkpoint)}"))
        print("wrote", args.html, file=sys.stderr)

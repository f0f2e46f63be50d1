"""Shows how deep a model in which tokens halt goes at every token of raw text, and on average over a corpus.

By default every line of the text is printed, coloured by depth. Reads the encoder of a fairseq checkpoint, or a model
in the published layout of ALBERT-ACT.
"""

import logging
import os

from fairseq_adaptive.command import wants_colour
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.files import read_lines, require_new, whole_file
from fairseq_adaptive.progress import progress, say
from fairseq_adaptive.ranges import BATCH, Parser


def load(args):
    """The model, its dictionary and the tokenizer."""
    from fairseq_adaptive.data.albert_tokenizer import AlbertTokenizer
    from fairseq_adaptive.data.subwords import SubwordNMT, Tokenized
    from fairseq_adaptive.hub import AlbertActModel
    from fairseq_adaptive.interop import albert_act
    from fairseq_adaptive.interop.checkpoint import load_model

    if os.path.isfile(args.model):
        if args.spm is not None:
            tokenizer = AlbertTokenizer(args.spm)
        elif args.codes is not None:
            tokenizer = SubwordNMT(args.codes)
        elif args.tokenized:
            tokenizer = Tokenized()
        else:
            raise UsageError(
                "say how the training text was split: --spm with its SentencePiece model, --codes with those of "
                "subword-nmt, or --tokenized where the input is split in the same way"
            )
        model, task = load_model(args.model, {"data": args.data} if args.data else {})
        return model, task.source_dictionary, tokenizer
    if args.codes is not None or args.tokenized:
        raise UsageError("--codes and --tokenized are for checkpoints: a published ALBERT-ACT has --spm")
    published = AlbertActModel.from_pretrained(args.model)
    if args.spm is None:
        return published.model, published.model.encoder.dictionary, published.needs_tokenizer()
    tokenizer = AlbertTokenizer(args.spm)
    return published.model, albert_act.dictionary_of(tokenizer, published.config), tokenizer


def as_written(sentence):
    """A sentence of subword-nmt's tokens with words where words were; the special tokens at its ends stay."""
    from fairseq_adaptive.data.subwords import as_in_text

    first = sentence.tokens[0] == "[CLS]"
    inner = as_in_text(sentence.tokens[first:-1])
    return sentence._replace(tokens=[*sentence.tokens[:first], *inner, sentence.tokens[-1]])


def main(argv=None, prog=None):
    parser = Parser(prog=prog, description=__doc__)
    parser.add_argument("model", help="a checkpoint, or a folder or Hugging Face name of a published ALBERT-ACT")
    parser.add_argument("--data", metavar="FOLDER", help="of a checkpoint: where dict.txt is (default: as in training)")
    split = parser.add_mutually_exclusive_group()
    split.add_argument(
        "--spm",
        metavar="FILE",
        help="SentencePiece model of the text (default: spiece.model in the folder of a published model)",
    )
    split.add_argument(
        "--codes", metavar="FILE", help="codes of subword-nmt; the input has spaces between words, as before apply-bpe"
    )
    split.add_argument("--tokenized", action="store_true", help="the input is split into the model's tokens already")
    parser.add_argument(
        "--input",
        default="-",
        metavar="FILE",
        help="the text, a sentence or paragraph a line, of which blank ones are left out (default: standard input)",
    )
    parser.add_argument("--batch-size", type=BATCH, default=16, metavar="N", help="lines at a time (default: 16)")
    parser.add_argument(
        "--color",
        choices=("auto", "always", "never"),
        default="auto",
        help="never: print depths as numbers (default: colours in a terminal)",
    )
    parser.add_argument("--html", metavar="FILE", help="write the coloured text as a page; must not exist")
    parser.add_argument(
        "--table", action="store_true", help="print the mean depth by frequency rank, part of the text and token type"
    )
    parser.add_argument("--plot", metavar="PNG", help="draw these tables; must not exist")
    args = parser.parse_args(argv)

    import torch

    import fairseq_adaptive.plugin  # noqa: F401  registers tasks and models
    from fairseq_adaptive.data.subwords import Tokenized
    from fairseq_adaptive.report.depth_map import depth_tables, format_tables, plot_tables, read_depths
    from fairseq_adaptive.report.pictures import require_picture
    from fairseq_adaptive.report.shading import legend, to_html, to_text

    logging.disable(logging.INFO)
    if args.html:
        require_new(args.html)
    if args.plot:
        require_picture(args.plot)
    lines = [line.strip() for line in read_lines(args.input) if line.strip()]
    model, dictionary, tokenizer = load(args)
    texts = [tokenizer.tokenize(line) for line in lines]
    if not any(texts):
        raise UsageError("there is no text to read: it is empty")
    tokens = [token for text in texts for token in text]
    unknown = sum(dictionary.index(token) == dictionary.unk() for token in tokens)
    if unknown > len(tokens) / 2:
        raise UsageError(
            f"the model does not know {unknown:,} of the {len(tokens):,} tokens: {tokenizer.path} "
            f"{getattr(tokenizer, 'advice', 'is not the SentencePiece model with which its training text was split')}"
        )
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    prints = not (args.html or args.table or args.plot)
    sentences, colour = [], wants_colour(args.color)
    for sentence in progress(read_depths(model, dictionary, texts, args.batch_size), "texts", len(texts)):
        sentence = as_written(sentence) if isinstance(tokenizer, Tokenized) else sentence
        if prints and colour and not sentences:
            say(legend(sentence.limit))
        sentences.append(sentence)
        if prints:
            say(to_text(sentence, colour))
    if args.html:
        with whole_file(args.html) as part, open(part, "w", encoding="utf-8") as file:
            file.write(to_html(sentences, f"Depth of {os.path.basename(os.path.normpath(args.model))}"))
        print("wrote", args.html)
    if args.table or args.plot:
        tables = depth_tables(sentences)
        print(format_tables(tables), end="")
        if args.plot:
            plot_tables(tables, sentences[0].limit, args.plot)
            print("wrote", args.plot)

"""``fairseq-adaptive COMMAND``, also ``python -m fairseq_adaptive COMMAND``: one module a command.

Each has ``main(argv=None, prog=None)``, which parses its flags before it imports what is slow, so that ``--help`` answers
at once.
"""

import difflib
import importlib
import sys

from fairseq_adaptive import __version__
from fairseq_adaptive.command import run
from fairseq_adaptive.printable import printable

# module of each command (plot_depth is "plot depth"), and what it does in a few words
COMMANDS = {
    "predict": "label raw texts, and show where tokens were skimmed or have halted",
    "answer": "answer the questions of a file in the format of SQuAD",
    "perplexity": "perplexity of a language model per token, word and character",
    "explore": "a page to type texts on, and to see what a model makes of them and spends",
    "report": "what checkpoints spend, where, and how good they are, side by side",
    "calibrate": "the earliest exit that loses little against full depth, with a guarantee",
    "dial": "turn a trained model to a share of its dense counterpart's multiply-adds",
    "average": "average checkpoints into one",
    "export": "write a model as a plain fairseq Transformer or a CTranslate2 model",
    "convert": "read a published BERT, RoBERTa, ALBERT-ACT, Transkimmer or Transformer-XL",
    "derive": "the layout that an attention search has found, and what it costs",
    "cutoffs": "the cutoffs that make an adaptive softmax fastest",
    "plot_depth": "how deep a model goes at every token of a text",
    "plot_skim": "which kinds of tokens a classifier skims, and before which layer",
    "plot_tape": "which patches of images an adatape_vit reads",
    "plot_search": "how an attention search came about",
    "plot_tradeoff": "quality over measured time, from reports",
    "zoo_pack": "pack a trained model as a small archive, with an entry in a manifest",
    "zoo_list": "what a zoo of small models has",
    "zoo_check": "check every archive of a zoo, before it is published",
    "flags": "the flags of an architecture, criterion, task or optimizer",
    "recipe": "print or copy the scripts, pages and configurations of an example",
    "demo": "train on real English-German text, translate, and score: 11 minutes",
    "info": "what is installed, what runs where, and why",
}
NAMES = [name.replace("_", " ") for name in COMMANDS]


def overview(prog: str) -> str:
    """All commands, a line each."""
    width = max(map(len, NAMES))
    lines = (f"  {name:<{width}}  {text}" for name, text in zip(NAMES, COMMANDS.values()))
    return "\n".join((f"usage: {prog} COMMAND [flags]", "", *lines, "", f"{prog} COMMAND --help shows its flags."))


def unknown(words) -> str:
    """The line for words that are no command."""
    pictures = [name for name in NAMES if name.startswith(f"{words[0]} ")]
    said = printable(" ".join(words[:2]) if pictures and words[1:] else words[0])
    if pictures:
        return f"{said!r} is no command: use one of {', '.join(pictures)}"
    near = difflib.get_close_matches(words[0], NAMES, 1)
    return f"{said!r} is no command: {f'did you mean {near[0]}? ' if near else ''}use one of {', '.join(NAMES)}"


def main(argv=None, prog: str = "fairseq-adaptive") -> None:
    """Run the command that ``argv`` begins with.

    Args:
        argv: its name and its flags (default: those of this program)
        prog: what was typed before them, for messages

    Raises:
        SystemExit: with status 2 where there is no such command
        UsageError: by commands
    """
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("-h", "--help"):
        print(overview(prog), file=sys.stdout if words else sys.stderr)
        sys.exit(0 if words else 2)
    if words[0] == "--version":
        print(f"fairseq_adaptive {__version__}")
        sys.exit(0)
    for length in (2, 1):
        module = "_".join(words[:length])
        if " ".join(words[:length]) in NAMES:
            command = importlib.import_module(f"{__name__}.{module}")
            return command.main(words[length:], prog=f"{prog} {' '.join(words[:length])}")
    print(f"{prog}: error: {unknown(words)}", file=sys.stderr)
    sys.exit(2)


def entry() -> None:
    """The program ``fairseq-adaptive``."""
    run(main)

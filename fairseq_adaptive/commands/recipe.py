"""Copies the scripts, page and configurations of an example to a folder, where the commands of its page run as they stand.

Without a name, all examples; with one, its scripts and how they are called; with a file of it, that file. A copy needs the
installed package alone.
"""

import difflib
import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import List

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.files import read_text, require_new, whole_file
from fairseq_adaptive.ranges import Parser

PACKAGE = Path(__file__).resolve().parents[1]
FOR_A_CLONE = ("scripts/setup.sh", "scripts/test.sh")
SHARED = ("examples/common.sh", "examples/download.sh", "examples/subwords.sh", "examples/steps.py", "scripts")


def home() -> Path:
    """The folder that has ``examples/`` and ``scripts/``: within the installed package, or the clone.

    Raises:
        UsageError: when there is none
    """
    for folder in (PACKAGE / "recipes", PACKAGE.parent):
        if (folder / "examples" / "common.sh").is_file():
            return folder
    raise UsageError(
        f"the examples are neither in {PACKAGE / 'recipes'} nor beside {PACKAGE}: install the package anew"
    )


def names() -> List[str]:
    return sorted(path.name for path in home().glob("examples/[!_]*") if path.is_dir())


def files(path: str) -> List[str]:
    """The files of an example, or of another folder, or one file, relative to :func:`home`."""
    found = home() / path
    every = [found] if found.is_file() else [each for each in sorted(found.rglob("*")) if each.is_file()]
    found = [each.relative_to(home()) for each in every if "__pycache__" not in each.parts]
    return [str(each) for each in found if str(each) not in FOR_A_CLONE]


def usage(script: str) -> str:
    """What the header of a script says: what it does, and its usage."""
    lines = read_text(home() / script).splitlines()[1:]
    header = [line.removeprefix("#").removeprefix(" ") for line in lines[: [*map(_code, lines), True].index(True)]]
    return "\n".join(header)


def _code(line):
    return not line.startswith("#")


def _title(name):
    pages = [f"examples/{name}/{page}" for page in ("README.md", "__init__.py")]
    (page,) = [each for each in files(f"examples/{name}") if each in pages]
    return read_text(home() / page).splitlines()[0].removeprefix("# ").removeprefix('"""')


def user_dir() -> str:
    """What fairseq finds this package by from any folder: its bare name where it lies beside fairseq, else where it is."""
    fairseq = importlib.util.find_spec("fairseq")
    beside = fairseq is not None and Path(fairseq.origin).resolve().parents[1] == PACKAGE.parent
    return PACKAGE.name if beside else json.dumps(str(PACKAGE))


def _text(path):
    """Of a file as it is copied: where hydra finds the package, which is not beside a copy."""
    data = (home() / path).read_bytes()
    if path.endswith(".yaml"):
        found = b"${hydra:runtime.cwd}/fairseq_adaptive"
        data = data.replace(b"user_dir: " + found, b"user_dir: " + user_dir().encode())
    return data


def copy(name: str, folder: str) -> List[str]:
    """Copy an example and what its scripts share; files that are there and the same are left.

    Raises:
        UsageError: before anything is written, when a file there is another one
    """
    wanted = {each: _text(each) for part in (*SHARED, f"examples/{name}") for each in files(part)}
    if name != "demo":  # some take its texts
        wanted |= {each: _text(each) for each in files("examples/demo")}
    lacking = []
    for path, data in wanted.items():
        target = Path(folder, path)
        if not (target.is_file() and target.read_bytes() == data):
            if os.path.lexists(target):
                require_new(target)
            lacking.append(path)
    for path in lacking:
        target = Path(folder, path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(target) as part:
            Path(part).write_bytes(wanted[path])
            shutil.copymode(home() / path, part)
    return list(wanted)


def main(argv=None, prog=None):
    parser = Parser(prog=prog, description=__doc__)
    parser.add_argument("name", nargs="?", metavar="NAME", help="of an example")
    parser.add_argument("file", nargs="?", metavar="FILE", help="print this file of it")
    parser.add_argument("--output", metavar="FOLDER", help="copy it there; files that are there stay as they are")
    args = parser.parse_args(argv)
    if args.output is not None and (args.file or not args.name):
        parser.error("--output takes a whole example: name it, and no file")

    known = names()
    if args.name is None:
        width = max(map(len, known))
        print("\n".join(f"{name:<{width}}  {_title(name)}" for name in known))
        return
    if args.name not in known:
        near = difflib.get_close_matches(args.name, known, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UsageError(f"there is no example {args.name}: {hint}there are {', '.join(known)}")
    own = files(f"examples/{args.name}")
    if args.file:
        path = f"examples/{args.name}/{args.file}"
        if path not in own:
            held = ", ".join(each.removeprefix(f"examples/{args.name}/") for each in own)
            raise UsageError(f"{args.name} has no file {args.file}: it has {held}")
        if path.endswith(".png"):
            raise UsageError(f"{args.file} is a picture: copy the example with --output FOLDER")
        print(_text(path).decode("utf-8"), end="")
        return
    if args.output is None:
        for path in own:
            print(path)
            if path.endswith(".sh"):
                print("\n".join(f"    {line}".rstrip() for line in usage(path).splitlines()))
        print(f"\n{parser.prog} {args.name} --output FOLDER copies them")
        return
    copied = copy(args.name, args.output)
    print(f"{len(copied)} files in {args.output}; the commands of the page of {args.name} run from there")

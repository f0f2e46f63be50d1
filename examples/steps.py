"""What examples that train many small models share: commands that run in processes forked from one that has imported fairseq,
results as JSON, and where they were made.
"""

import datetime
import json
import os
import platform
import runpy
import shlex
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Dict, Iterable, List

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.files import read_json, whole_file


def do(words, log, check=True):
    """Run a command in a process of its own, its output in a log.

    Raises:
        UsageError: where it fails
    """
    sys.stdout.flush(), sys.stderr.flush()
    child = os.fork()
    if not child:
        os._exit(become(words, log))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if check and status:
        raise UsageError(f"{words[0]} ended with {status}; all it said is in {log}")
    return status


def become(words, log) -> int:
    """Be a command; return its exit status."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if str(log).endswith(".out") else os.O_APPEND))
    os.dup2(file, 1), os.dup2(file, 2)
    if not str(log).endswith(".out"):
        print(shlex.join(words), flush=True)
    sys.argv = words
    try:
        if words[0] == "python3":
            sys.argv = words[1:]
            runpy.run_path(words[1], run_name="__main__")
        elif words[0] == "fairseq-adaptive":
            from fairseq_adaptive import commands

            commands.main(words[1:])
        else:
            __import__(f"fairseq_cli.{words[0].removeprefix('fairseq-')}", fromlist=["cli_main"]).cli_main()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(bool(end.code))
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush(), sys.stderr.flush()
    return status or 0


def write_json(path, content) -> None:
    with whole_file(path) as part, open(part, "w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=1) + "\n")


def chosen(only: str, known: Iterable[str], what: str) -> List[str]:
    """The names in ``A,B``, or all where it is empty.

    Raises:
        UsageError: for one that is not known
    """
    names = only.split(",") if only else list(known)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UsageError(f"--only {unknown[0]!r} is no {what} of this: there are {', '.join(known)}")
    return names


def seeds_of(text: str) -> List[int]:
    """The numbers in ``1,2,3``.

    Raises:
        UsageError: for what is no such list
    """
    seeds = text.split(",")
    if not all(each.isdecimal() and int(each) for each in seeds) or len(set(seeds)) < len(seeds):
        raise UsageError(f"--seeds {text!r}: give different whole numbers above 0, such as 1,2,3")
    return [int(each) for each in seeds]


def begin(folder: Path, settings: Dict) -> None:
    """Make a folder of results, or see that it was begun with the same settings.

    Raises:
        UsageError: where it was not
    """
    path = folder / "settings.json"
    if path.exists() and read_json(path) != settings:
        raise UsageError(f"{folder} was begun with {json.dumps(read_json(path))}: name another folder, or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        write_json(path, settings)


def about() -> Dict[str, str]:
    """Machine, date and commit."""
    names = [each for each in _text("/proc/cpuinfo").splitlines() if each.startswith("model name")]
    machine = f"{len(names)} cores of {names[0].partition(': ')[2]}" if names else platform.processor()
    here = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(here, capture_output=True, text=True).stdout.strip()
    except OSError:
        commit = ""
    load = _text("/proc/loadavg").partition(" ")[0]
    return {"machine": machine, "load": load, "date": datetime.date.today().isoformat(), "commit": commit}


def _text(path):
    try:
        return Path(path).read_text()
    except OSError:
        return ""

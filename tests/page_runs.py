"""Runs the commands of a page as they stand there, small.

A page is one bash script, which runs in a folder of its own as a user's commands run from the root of the repository: loops,
arrays, pipes and variables are bash's, and the scripts of the examples are run by it. The programs are wrappers that call
``cli/shrunk.py``, forked from a process that has imported fairseq.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import List

from cli import commands
from pages import PROGRAMS, ROOT, Call, name_of, plain, shell_blocks

# of scripts that download: from archives that are made small (cli/small_data.py)
MIRRORS = {
    "examples/classification/download.sh": "text_archives",
    "examples/question_answering/download.sh": "squad_archives",
    "examples/translation/prepare-wmt14en2de.sh": "wmt14_archives",
    "examples/language_model/prepare.sh wikitext-103": "wikitext_archives",
}
# what else scripts are told
MORE = {
    "scripts/demo.sh": "--here --updates 8 --data RAW --out demo",
    "examples/language_model/small.sh": "MYTEXT",
    "examples/gallery/run.sh": "--only plain-3,act",
    "examples/depth/run.sh": "--only plain-3,act",
    "examples/gallery/keys.sh": "--only shared",
    "examples/gallery/priors.sh": "--only loop_gate",
    "examples/translation/evaluate.sh": "--last 1",
    "examples/translation/depth-lora.sh": "--updates 10 --seeds 1",
}
_WRAPPER = r"""#!/bin/bash
name=${0##*/} separator=$'\x1f'
IFS=$separator
printf '%s\x1e' "$PAGE_LINE$IFS$PAGE_WITHIN$IFS$name$IFS$*" >> "$PAGE_RECORD"
IFS=$' \t\n'
[[ ! "$name $*" =~ ^($PAGE_ONLY_READ) ]] || exit 0
case $name in
  bash)
    kind='' more=''
    case "${1-} ${2-}" in CASES esac
    if [ -n "$kind" ]; then
      [ -e ".$kind" ] || given "$kind" ".$kind"
      set -- "$@" --mirror "file://$PWD/.$kind" --checksums ".$kind/SUMS"
    fi
    PAGE_WITHIN=script exec /bin/bash "$@" $more ;;
  python | python3)
    case ${1-} in -c) exec "$PAGE_STUBS/python" "$@" ;; esac ;;
esac
TESTS_KIND=pages exec "$PAGE_STUBS/python" "$PAGE_ROOT/tests/cli/shrunk.py" "$name" "$@"
"""
_GIVEN = '#!/bin/bash\nexec "$PAGE_STUBS/python" "$PAGE_ROOT/tests/cli/small_data.py" "$@"\n'
_FAILED = "trap 'echo \"the block at line $PAGE_LINE ends at: $BASH_COMMAND\" >&2' ERR"


def wrappers(folder: Path):
    """Write them to a folder for PATH."""
    cases = [f'*"{script}"*) kind={kind} ;;' for script, kind in MIRRORS.items()]
    cases += [f'*"{script}"*) more={shlex.quote(more)} ;;' for script, more in MORE.items()]
    folder.mkdir()
    for name in {*PROGRAMS, "given"} - {"curl"}:
        text = _GIVEN if name == "given" else _WRAPPER.replace("CASES", " ".join(cases))
        folder.joinpath(name).write_text(text)
        folder.joinpath(name).chmod(0o755)


def run_page(page: Path, folder: Path, data: Path, before=(), values=(), without=(), only_read=()) -> List[Call]:
    """Run all commands of a page in their order, and return the calls of programs, those within scripts, too.

    Args:
        page: it
        folder: new, where it runs
        data: where small data are kept
        before: commands that make what the page takes for given, by the beginning of the block that they come before;
            ``given KIND PATH`` makes small data
        values: what words stand for, by word
        without: beginnings of blocks that are left out
        only_read: expressions of calls that do nothing

    Raises:
        AssertionError: when a command fails, with the line where its block begins
    """
    folder.mkdir(parents=True)
    for name in ("examples", "scripts", "fairseq_adaptive"):
        folder.joinpath(name).symlink_to(ROOT / name)
    wrappers(folder / ".bin")
    script, before = ["set -eEuo pipefail", _FAILED], dict(before)
    for line, within, block in shell_blocks(page):
        block = plain(block, dict(values))
        if not within and not block.startswith(tuple(without)):
            start = next((start for start in before if block.startswith(start)), None)
            script += [
                f"export PAGE_LINE={line} PAGE_WITHIN=before",
                before.pop(start, ":"),
                "export PAGE_WITHIN=",
                block,
            ]
    assert not before, f"{name_of(page)} has no block that begins so: {[*before]}"
    record = folder / ".record"
    record.touch()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PAGE_RECORD": str(record)}
    environment |= commands.stubs(environment)
    commands.serve_pages(environment)
    environment |= {
        "PAGE_DATA": str(data),
        "PAGE_ROOT": str(ROOT),
        "PAGE_STUBS": commands.stub_folder(),
        "HF_HUB_OFFLINE": "1",
    }
    environment |= {"PAGE_ONLY_READ": "|".join(only_read) or "$^"}
    folders = (str(folder / ".bin"), commands.stub_folder(), str(Path(sys.executable).parent), os.environ["PATH"])
    environment["PATH"] = os.pathsep.join(folders)
    with open(folder / ".output", "w+b") as output:
        done = subprocess.run(
            ["/bin/bash", "-c", "\n".join(script)],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=600,
        )
        output.seek(0)
        said = output.read().decode(errors="replace")
    assert done.returncode == 0, f"{name_of(page) if page.is_relative_to(ROOT) else page}: {said[-4000:]}"
    made = [each.split("\x1f") for each in record.read_text(encoding="utf-8").split("\x1e")[:-1]]
    return [Call(str(page), int(line), within, tuple(words)) for line, within, *words in made if within != "before"]


def lines_of(page: Path, without=()) -> List[int]:
    """Where the blocks of commands begin."""
    return [line for line, within, block in shell_blocks(page) if not within and not block.startswith(tuple(without))]

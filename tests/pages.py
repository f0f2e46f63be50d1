"""The commands of the pages, taken from the pages; and stand-ins for the programs that scripts call, which write down how they
were called and leave the files behind that the next command asks for.
"""

import re
import textwrap
from pathlib import Path
from typing import Dict, List, NamedTuple, Tuple

ROOT = Path(__file__).resolve().parents[1]
MADE = ("docs/flags.md", "docs/composition.md")  # by commands, from what there is
PAGES = [
    path
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted(ROOT.glob("docs/**/*.md")),
        *sorted(ROOT.glob("examples/**/README.md")),
    )
    if str(path.relative_to(ROOT)) not in MADE
]
PROGRAMS = (
    "bash curl fairseq-adaptive fairseq-eval-lm fairseq-generate fairseq-hydra-train fairseq-interactive fairseq-preprocess "
    "fairseq-score fairseq-train fairseq-validate pip pre-commit python python3 sacrebleu sacremoses subword-nmt "
    "tensorboard"
).split()
_CALL = rf"(?:{'|'.join(PROGRAMS)})(?: |$)"
_IS_SHELL = re.compile(rf"^\s*(?:(?:[A-Z_]+=\S+|for .*; do|do|then) +)*{_CALL}", re.MULTILINE)
_INLINE = re.compile(rf"`({_CALL}[^`]*)`")
# names that stand for others in every page; a page may have values of its own
VALUES = {"ARCH": "transkimmer_base", "LAYOUT": "afff*3,f*4", "CLONE": "."}


class Call(NamedTuple):
    """One call of a program.

    Args:
        page: its name
        line: of the page, where its block begins
        within: "" for a command of a block, "sentence" for one in a sentence, "script" for one that a script made
        words: the program and its arguments
    """

    page: str
    line: int
    within: str
    words: Tuple[str, ...]

    def __str__(self):
        return f"{self.page}:{self.line}: {' '.join(self.words)}"


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def code_blocks(page: Path) -> List[Tuple[int, str]]:
    """The first line and the text of every block of code, fenced or indented; an indented one ends at an empty line."""
    found, block, fence = [], [], None
    lines = [*page.read_text(encoding="utf-8").split("\n"), ""]
    for number, line in enumerate(lines, 1):
        if line.lstrip().startswith("```"):
            fence = None if fence is not None else line.strip()[3:]
            inside = False
        else:
            inside = fence in ("", "bash", "sh", "console") or (
                fence is None and line.startswith("    ") and (block or not lines[number - 2].strip())
            )
        if inside:
            block.append(line)
        elif block:
            found.append((number - len(block), textwrap.dedent("\n".join(block))))
            block = []
    return found


def shell_blocks(page: Path) -> List[Tuple[int, str, str]]:
    """Line, kind (see :class:`Call`) and text of those blocks that are commands, and of the commands within sentences."""
    text = page.read_text(encoding="utf-8")
    inline = ((text.count("\n", 0, each.start()) + 1, " ".join(each[1].split())) for each in _INLINE.finditer(text))
    return [
        *((line, "", block) for line, block in code_blocks(page) if _IS_SHELL.search(block)),
        *((line, "sentence", words) for line, words in inline if " " in words),
    ]


def python_blocks(page: Path) -> List[str]:
    """The blocks of a page that are Python: fenced as such, or indented and beginning with an import, at each of which that
    follows an empty line another one begins."""
    text = page.read_text(encoding="utf-8")
    fenced = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    indented = re.findall(r"(?<=\n\n)    (?:from|import) \w.*\n(?:(?:    .*)?\n)*", text)
    apart = [each for block in indented for each in re.split(r"\n\n(?=(?:from|import) \w)", textwrap.dedent(block))]
    return fenced + apart


def run_python(page: str, containing: str, checkpoint=None, **names) -> Dict:
    """Run the blocks of a page that contain some text, as they stand.

    Args:
        page: from the root
        containing: of the blocks that are run, one after the other
        checkpoint: what stands for that of the page
        names: that the page takes for given

    Returns:
        the names after it
    """
    blocks = [block for block in python_blocks(ROOT / page) if containing in block]
    assert blocks, f"{page} has no block with {containing}"
    names["__name__"] = "block"
    for block in blocks:
        block = re.sub(r'"[\w/]*checkpoint_best\.pt"', repr(str(checkpoint)), block)
        exec(compile(block, page, "exec"), names)
    return names


def plain(block: str, values: Dict[str, str]) -> str:
    """A block without what is said to readers: "..." for what a command before has, or what ``values`` have for it, brackets
    around what may be left out, and names that stand for others."""
    values = {**VALUES, **values}
    block = re.sub(r"\[[A-Z]+ \.\.\.\]", "", block)
    block = re.sub(r"(?<=\s)\.\.\.(?=\s|$)", lambda _: values.get("...", ""), block)
    block = re.sub(r"\[(-[^]]*)\]", r"\1", block)
    for name, value in values.items():
        block = re.sub(rf"\b{name}\b", value, block) if name.isalpha() else block
    return block


# what a program leaves behind, so that the next command finds it
_STAND_IN = r"""#!/bin/bash
set -u
name=${0##*/} separator=$'\x1f'
IFS=$separator
printf '%s\x1e' "$PAGE_LINE$IFS$PAGE_WITHIN$IFS$name$IFS$*" >> "$PAGE_RECORD"
IFS=$' \t\n'
of() { # FLAG WORD...: the value of a flag
  local flag=$1
  shift
  while [ $# -gt 1 ]; do
    [ "$1" != "$flag" ] || { echo "$2"; return; }
    shift
  done
}
leave() { local file; for file in "$@"; do mkdir -p "$(dirname -- "$file")"; [ -e "$file" ] || echo 1 > "$file"; done; }
into() { # FLAG WORD...: leave the file of a flag
  local file
  file=$(of "$@")
  [ -z "$file" ] || leave "$file"
}
case $name in
  bash)
    case ${1-} in
      scripts/*.sh | */scripts/*.sh) [ -f "$1" ] ;;
      *) PAGE_WITHIN=script exec /bin/bash "$@" ;;
    esac ;;
  python | python3)
    case ${1-} in
      -c)
        case $2 in *device_count*) echo 0 ;; *) [ -t 0 ] || cat > /dev/null; echo 1 ;; esac ;;
      -m) ;;
      *)
        [ -f "$1" ] || { echo "there is no $1" >&2; exit 1; }
        [ ! -p /dev/stdin ] || cat > /dev/null # else what writes to it may be told that nobody reads
        case ${1##*/} in
          encode.py)
            for file in "${@:2}"; do
              [[ $file == *.txt ]] || continue
              leave "${file%.txt}".{label,input0}
              [[ " $* " != *" --pairs "* ]] || leave "${file%.txt}.input1"
            done ;;
          convert_checkpoint.py) out=$(of --output "$@"); leave "$out/checkpoint.pt" "$out/dict.txt" ;;
          texts.py) leave "$4"/{train,dev,test}.txt ;;
          prepare_corpus.py) leave "$2"/{train,valid,test}.{en,de} ;;
          prepare_digits.py) leave "$2/train.npz" ;;
          split.py) leave "$3" "$4" ;;
          count_windows.py) echo 1 ;;
          describe.py) echo 'to do: 1' >&2; echo '2 bert transkimmer_bert_base 8' ;;
          optimal_cutoffs.py) echo '--adaptive-softmax-cutoff 2,4' ;;
          derive_architecture.py) echo '--layout af' ;;
          *) into --output "$@" ;;
        esac ;;
    esac ;;
  fairseq-preprocess)
    out=$(of --destdir "$@") source=$(of --source-lang "$@") target=$(of --target-lang "$@")
    leave "$out/dict.${source:+$source.}txt" "$out/train.bin"
    [ -z "$source" ] || leave "$out"/{train,valid,test}."$source-$target".{"$source","$target"}.bin ;;
  fairseq-train)
    out=$(of --save-dir "$@")
    leave "${out:-checkpoints}"/checkpoint_{best,last}.pt
    echo "epoch 1 | valid on 'valid' subset | accuracy 1"
    echo 'done training' ;;
  fairseq-generate) printf 'T-0\t1\nH-0\t-1\t1\n' ;;
  fairseq-score) echo 'BLEU4 = 1' ;;
  fairseq-eval-lm) echo 'Loss (base 2): 1' ;;
  fairseq-adaptive) into --output "$@" ;;
  sacremoses | subword-nmt) cat > /dev/null; echo 1 ;;
  sacrebleu) echo 'BLEU = 1' ;;
esac
exit 0
"""


def stand_ins(folder: Path):
    """Write them to a folder for PATH."""
    folder.mkdir()
    for name in PROGRAMS:
        folder.joinpath(name).write_text(_STAND_IN)
        folder.joinpath(name).chmod(0o755)

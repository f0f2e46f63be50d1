#!/usr/bin/env python3
"""Makes texts with labels, a line each, out of the files of a published data set.

Writes train.txt, dev.txt and test.txt, as far as their labels are published, and submission/NAME.txt for GLUE's test
sets, where a number is in the label's place. Between label and text, and between two texts, there is a tab.
"""

import csv
import sys
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple, Tuple

from fairseq_adaptive.command import run
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.files import require_new, whole_folder
from fairseq_adaptive.ranges import Parser


class Glue(NamedTuple):
    """Columns of the texts and of the label, and for each file to write the one that it is made of."""

    texts: Tuple[str, ...]
    label: str
    files: Dict[str, str]


def _glue(name, texts, label):
    return Glue(texts, label, {"train": "train", "dev": "dev", f"submission/{name}": "test"})


PAIR = ("sentence1", "sentence2")
GLUE = {
    "CoLA": _glue("CoLA", ("sentence",), "label"),
    "SST-2": _glue("SST-2", ("sentence",), "label"),
    "MRPC": _glue("MRPC", ("#1 String", "#2 String"), "Quality"),
    "STS-B": _glue("STS-B", PAIR, "score"),
    "QQP": _glue("QQP", ("question1", "question2"), "is_duplicate"),
    "MNLI": Glue(
        PAIR,
        "gold_label",
        {
            "train": "train",
            "dev": "dev_matched",
            "dev_mismatched": "dev_mismatched",
            "submission/MNLI-m": "test_matched",
            "submission/MNLI-mm": "test_mismatched",
            "submission/AX": "AX",
        },
    ),
    "QNLI": _glue("QNLI", ("question", "sentence"), "label"),
    "RTE": _glue("RTE", PAIR, "label"),
    "WNLI": _glue("WNLI", PAIR, "label"),
}
COLA = ["source", "label", "star", "sentence"]  # train.tsv and dev.tsv do not name them
PAIRS = [name for name, task in GLUE.items() if len(task.texts) == 2]
Rows = Iterator[Tuple[str, ...]]


def read_texts(path, pairs: bool = False) -> Iterator[List[str]]:
    """A label and one or two texts from every line of a file as this script writes it; for the tab of single texts a
    space will do.

    Raises:
        UsageError: when a line has no label, or not two texts
    """
    try:
        with open(path, encoding="utf-8", newline="\n") as lines:
            for number, line in enumerate(lines, start=1):
                line = line.rstrip("\r\n")
                fields = line.split("\t", -1 if pairs else 1) if pairs or "\t" in line else line.split(" ", 1)
                if not fields[0].strip():
                    raise UsageError(f"{path}, line {number}: there is no label in front of the text")
                if pairs and len(fields) != 3:
                    raise UsageError(
                        f"{path}, line {number}: {len(fields)} fields, but a pair is a label, a tab, a "
                        "text, a tab and a text"
                    )
                yield [fields[0].strip(), *(fields[1:] or [""])]
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text (byte {error.start})") from None


def read_tsv(path: Path, columns=None) -> Iterator[Dict[str, str]]:
    """Rows by the names of the columns, which the first line has if they are not given. Quotes mean nothing."""
    with open(path, encoding="utf-8-sig", newline="\n") as lines:
        for line in lines:
            fields = line.rstrip("\r\n").split("\t")
            if columns is None:
                columns = fields
            else:
                yield dict(zip(columns, fields))


def glue(task: str, folder: Path, source: str, hidden: bool) -> Rows:
    """Rows of a file of GLUE; ``hidden``: a number stands for the label. Rows without label or text, which QQP's first
    edition has, are left out."""
    texts, label, _ = GLUE[task]
    path, columns, left_out = folder / f"{source}.tsv", None, 0
    if task == "CoLA" and not hidden:
        columns = COLA
    rows = mrpc(folder, source) if task == "MRPC" and not path.is_file() else read_tsv(path, columns)
    for number, row in enumerate(rows):
        fields = [row.get("index", row.get("id", str(number))) if hidden else row.get(label), *map(row.get, texts)]
        if None not in fields:
            yield tuple(fields)
        elif number == 0 or hidden:
            lacking = [name for name in (*texts, label) if name not in row]
            raise UsageError(f"{path}, line {number + 2}: there is no column {' or '.join(lacking)}")
        else:
            left_out += 1
    if left_out:
        print(f"{path}: left out {left_out} rows that lack a column", file=sys.stderr)


def mrpc(folder: Path, source: str) -> Iterator[Dict[str, str]]:
    """GLUE's split of MRPC, which is not published as such."""
    part = "test" if source == "test" else "train"
    rows = read_tsv(folder / f"msr_paraphrase_{part}.txt")
    if part == "test":
        return ({**row, "index": str(number)} for number, row in enumerate(rows))
    with open(folder / "mrpc_dev_ids.tsv", encoding="utf-8") as lines:
        dev = {tuple(line.split()) for line in lines}
    return (row for row in rows if ((row.get("#1 ID"), row.get("#2 ID")) in dev) == (source == "dev"))


def newsgroups(folder: Path) -> Rows:
    """A posting each, with what is left of its header."""
    for group in sorted(path for path in folder.iterdir() if path.is_dir()):
        for path in sorted(group.iterdir()):
            yield group.name, " ".join(path.read_text(encoding="latin-1").split())


def imdb(folder: Path) -> Rows:
    for label in ("neg", "pos"):
        for path in sorted((folder / label).iterdir()):
            yield label, " ".join(path.read_text(encoding="utf-8").replace("<br />", " ").split())


def yelp(path: Path) -> Rows:
    """A number of stars each and a review; line ends are written as a backslash and an n."""
    with open(path, encoding="utf-8", newline="") as lines:
        for stars, review in csv.reader(lines):
            yield stars, " ".join(review.replace("\\n", " ").split())


OTHERS = {
    "20news": lambda raw, split: newsgroups(raw / f"20news-bydate-{split}"),
    "imdb": lambda raw, split: imdb(raw / "aclImdb" / split),
    "yelp": lambda raw, split: yelp(raw / "yelp_review_full_csv" / f"{split}.csv"),
}
NAMES = (*GLUE, *OTHERS)


def parts_of(task: str, raw: Path) -> Iterator[Tuple[str, Rows]]:
    """Names of the files to write, and their rows."""
    if task in GLUE:
        for target, source in GLUE[task].files.items():
            if source == "AX" and not (raw / task / "AX.tsv").is_file():
                continue  # GLUE has it beside its tasks
            yield target, glue(task, raw / task, source, target.startswith("submission/"))
    else:
        for split in ("train", "test"):
            yield split, OTHERS[task](raw, split)


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("task", choices=NAMES)
    parser.add_argument("raw", type=Path, help="the folder that download.sh made, or one of GLUE's layout")
    parser.add_argument("output", type=Path, help="new folder")
    args = parser.parse_args()

    require_new(args.output)
    with whole_folder(args.output) as folder:
        made = Path(folder)
        for name, rows in parts_of(args.task, args.raw):
            path, number = made / f"{name}.txt", -1
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with open(path, "w", encoding="utf-8") as file:
                    for number, row in enumerate(rows):
                        file.write("\t".join(row) + "\n")
            except (FileNotFoundError, NotADirectoryError) as error:
                raise UsageError(f"there is no {error.filename}: download.sh {args.task} {args.raw} gets it") from None
            except UnicodeDecodeError as error:
                raise UsageError(f"the texts of {args.task} in {args.raw} are not UTF-8 ({error.reason})") from None
            if number < 0:
                raise UsageError(f"there are no texts of {args.task} for {name}.txt in {args.raw}")
            print(f"{args.output}/{name}.txt: {number + 1} texts", file=sys.stderr)


if __name__ == "__main__":
    run(main)

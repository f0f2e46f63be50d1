"""Small archives of GLUE's layout and names."""

import random
import re
import zipfile

WORDS = "good bad film was the a story , . it never works plot".split()
GLUE = {  # header of the labelled files, one of test, columns of the texts and the label
    "CoLA": (None, "index sentence", (3,), 1),
    "SST-2": ("sentence label", "index sentence", (0,), 1),
    "MRPC": ("Quality,#1 ID,#2 ID,#1 String,#2 String", None, (3, 4), 0),
    "STS-B": (
        "index genre filename year old_index source1 source2 sentence1 sentence2 score",
        "index genre filename year old_index source1 source2 sentence1 sentence2",
        (7, 8),
        9,
    ),
    "QQP": ("id qid1 qid2 question1 question2 is_duplicate", "id question1 question2", (3, 4), 5),
    "MNLI": (
        "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse "
        "sentence2_parse sentence1 sentence2 label1 gold_label",
        "index sentence1 sentence2",
        (8, 9),
        11,
    ),
    "QNLI": ("index question sentence label", "index question sentence", (1, 2), 3),
    "RTE": ("index sentence1 sentence2 label", "index sentence1 sentence2", (1, 2), 3),
    "WNLI": ("index sentence1 sentence2 label", "index sentence1 sentence2", (1, 2), 3),
}
LABELS = {
    "MNLI": ["entailment", "neutral", "contradiction"],
    "QNLI": ["entailment", "not_entailment"],
    "RTE": ["entailment", "not_entailment"],
    "STS-B": ["0.250", "4.000"],
}


def rows_of(task, count, seed):
    """``count`` rows of a labelled file; a text says whether it is good or bad, and the label is that."""
    header, _, places, label = GLUE[task]
    columns = 4 if header is None else len(re.split("[ ,](?!String|ID)", header))
    rng, labels = random.Random(seed), LABELS.get(task, ["0", "1"])
    for number in range(count):
        row, kind = [str(number)] * columns, rng.randrange(len(labels))
        for place in places:
            row[place] = " ".join([["bad", "good", "story"][kind], *rng.choices(WORDS[2:], k=rng.randint(2, 5))])
        row[label] = labels[kind]
        yield row


def table(header, rows, end="\n"):
    header = [] if header is None else [re.split(" " if "," not in header else ",", header)]
    return "".join("\t".join(row) + end for row in [*header, *rows])


def write_glue(folder):
    """The archives of all nine tasks, and of the diagnostic set."""
    for task, (header, test, places, _) in GLUE.items():
        files = {"train": table(header, rows_of(task, 48, 1)), "dev": table(header, rows_of(task, 16, 2))}
        if task == "QQP":
            files["train"] += "7\t8\n"  # the first edition has such rows
        short = [[str(number), *["a good film"] * len(places)] for number in range(3)]
        whole = [[str(number)] * 7 + ["a film", "a plot"] for number in range(3)]
        files["test"] = table(test, whole if task == "STS-B" else short)
        if task == "MNLI":
            both = {f"{name}_{kind}": files[name] for name in ("dev", "test") for kind in ("matched", "mismatched")}
            files = {"train": files["train"], **both}
            (folder / "AX.tsv").write_text(files["test_matched"])
        if task == "MRPC":
            rows = list(rows_of(task, 64, 1))
            (folder / "msr_paraphrase_train.txt").write_bytes(table(header, rows, "\r\n").encode("utf-8-sig"))
            (folder / "msr_paraphrase_test.txt").write_text(table(header, rows[:3]), encoding="utf-8-sig")
            (folder / "mrpc_dev_ids.tsv").write_text("".join(f"{row[1]}\t{row[2]}\n" for row in rows[5::4]))
            continue
        name = {"QQP": "QQP-clean", "QNLI": "QNLIv2"}.get(task, task)
        with zipfile.ZipFile(folder / f"{name}.zip", "w") as archive:
            for split, text in files.items():
                archive.writestr(f"{task}/{split}.tsv", text)
            archive.writestr("__MACOSX/ignored", "x")

"""What the runs of the gallery have come to: scores of a run, all of them with times in one file, and means over seeds."""

import functools
import statistics
import sys
from pathlib import Path
from typing import Dict, List

from cells import CELLS, LANGUAGE_MODEL

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.files import read_json, read_lines

sys.path.insert(1, str(Path(__file__).parents[1]))  # of the examples
from steps import about, do, write_json  # noqa: E402

QUALITY = {"language_model": "bits", "translation": "chrf"}
NAMES = {"bits": "bits per character", "chrf": "chrF"}
DIGITS = {"bits": 3, "bleu": 2, "chrf": 2, "milliseconds": 2}


def bleu(path, reference, language) -> Dict[str, float]:
    """sacreBLEU and chrF of what ``fairseq-generate`` has written, detokenised, against the text as it was written."""
    from sacrebleu.metrics import BLEU, CHRF
    from sacremoses import MosesDetokenizer

    lines = [each[2:].split("\t") for each in read_lines(path) if each.startswith("H-")]
    detokenize = MosesDetokenizer(lang=language).detokenize
    hypotheses = [detokenize(text.split()) for _, _, text in sorted(lines, key=lambda each: int(each[0]))]
    references = read_lines(reference)
    if len(hypotheses) != len(references):
        raise UsageError(f"{path} has {len(hypotheses)} sentences, and {reference} has {len(references)}")
    metrics = BLEU(), CHRF()
    found = [round(each.corpus_score(hypotheses, [references]).score, 3) for each in metrics]
    return {**dict(zip(("bleu", "chrf"), found)), "signature": str(metrics[0].get_signature())}


@functools.cache
def per_token(data, text) -> Dict[str, float]:
    """How many words (and line ends) and how many characters of a raw text a token of its binarised form stands for."""
    from fairseq.data import data_utils

    from fairseq_adaptive.report.perplexity import count_text

    binarised = data_utils.load_indexed_dataset(str(data / "bin" / "test"))  # whose sizes are gone when it is
    counts, tokens = count_text(text), int(binarised.sizes.sum())
    return {"words": (counts["words"] + counts["lines"]) / tokens, "characters": counts["characters"] / tokens}


def scores(gallery, name, seed) -> List[Dict]:
    """A row for every depth that a run was dialled to, without times."""
    folder, rows = gallery.out / f"{name}-{seed}", []
    for depth in gallery.depths(name):
        stem = "checkpoint_last" if depth is None else f"at-{depth}"
        (model,) = read_json(folder / f"{stem}.json")["models"]
        quality, stacks = model["quality"], model["stacks"]
        turned = {part: each["mean_depth"] for part, each in stacks.items()}
        row = {"task": gallery.task, "cell": name, "seed": seed, "dialled_to": depth}
        log = folder / f"dial-{depth}.log"
        if depth is not None and "wrote" not in log.read_text():
            row["not_dialled"] = log.read_text().strip().rpartition("UsageError: ")[2].splitlines()[0]
        row["parameters"] = model["parameters"]["unique"]
        row["multiply_adds"] = model["multiply_adds"]["total"] / model["texts"]
        row["mean_depth"] = {part.partition(".")[0]: round(each, 3) for part, each in turned.items()}
        row["loss"] = quality.get("nll_loss") or quality["loss"]
        if gallery.task == LANGUAGE_MODEL:
            units = per_token(gallery.data, gallery.text)
            row["bits"] = row["loss"] / units["characters"]
            row["word_perplexity"] = 2 ** (row["loss"] / units["words"])
        else:
            row.update(read_json(folder / f"{stem}.bleu.json"))
        row["training_seconds"] = read_json(folder / "trained.json")["seconds"]
        row["checkpoint"] = str(folder / f"{stem}.pt")
        if (folder / "repeats.json").exists() and gallery.args.group == "keys":
            found = read_json(folder / "repeats.json")["loss"]
            row["repeats"] = {answer: each / units["characters"] for answer, each in found.items()}
        rows.append(row)
    return rows


def line(gallery, name, seed) -> str:
    """A run in a line."""
    quality = QUALITY[gallery.task]
    found = [f"{row[quality]:.3f} at {row['multiply_adds'] / 1e6:.1f}M" for row in scores(gallery, name, seed)]
    return f"{name} seed {seed}: {NAMES[quality]} {', '.join(found)} multiply-adds a text"


def collect(gallery, done) -> None:
    """Time all runs in turn, and write what they have come to."""
    rows = [row for name, seed in done for row in scores(gallery, name, seed)]
    paths = [row.pop("checkpoint") for row in rows]
    if not paths:
        return
    group = gallery.args.group
    timed = time_all(gallery, paths) if group == "gallery" else None
    if timed is not None:
        for row, model in zip(rows, timed["models"]):
            row["milliseconds"] = 1000 * model["seconds"] / model["texts"]
    found = {
        "group": group,
        "task": gallery.task,
        **about(),
        **({name: timed[name] for name in ("torch", "threads", "rounds", "batch_size")} if timed is not None else {}),
        **{name: getattr(gallery.args, name) for name in ("updates", "width")},
        "subset": "test",
        "runs": rows,
    }
    output = gallery.out / f"{'results' if group == 'gallery' else group}.json"
    output.unlink(missing_ok=True)  # that of an earlier call
    write_json(output, found)
    print(table(found))
    print("wrote", output)


def time_all(gallery, paths) -> Dict:
    """A report of all checkpoints, timed in turn; that of an earlier call where it has the same ones."""
    times, rounds = gallery.out / "times.json", gallery.args.rounds
    if times.exists():
        known = read_json(times)
        if [each["checkpoint"] for each in known["models"]] != paths or known["rounds"] != rounds:
            times.unlink()
    if not times.exists():
        print(f"timing {len(paths)} models in turn, {rounds} rounds", flush=True)
        do(gallery.times(paths, times), gallery.out / "times.log")
    return read_json(times)


def read_results(path) -> Dict:
    """A file of :func:`collect`.

    Raises:
        UsageError: when it is none
    """
    found = read_json(path)
    try:
        numbers = [QUALITY[found["task"]], "multiply_adds", *(["milliseconds"] if found["group"] == "gallery" else [])]
        for row in found["runs"]:
            [float(row[name]) for name in numbers], int(row["seed"]), CELLS[row["cell"]]
        found["runs"][0], found["machine"], found["group"]
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path} was not written by examples/gallery: {error!r}") from None
    return found


def by_cell(found: Dict) -> Dict:
    """The rows of each cell, and of each depth that it was dialled to, in the order of the file."""
    rows = {}
    for row in found["runs"]:
        rows.setdefault((row["cell"], row["dialled_to"]), []).append(row)
    return rows


def mean(rows, name) -> float:
    return statistics.fmean(row[name] for row in rows)


def spread(rows, name) -> str:
    """Mean and, of several seeds, standard deviation."""
    values = [row[name] for row in rows]
    digits = DIGITS[name]
    found = f"{statistics.fmean(values):.{digits}f}"
    return found + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def table(found: Dict) -> str:
    """A table in Markdown, a line a cell: means, and standard deviations over seeds; multiply-adds as a share of plain-6's
    where that is there, else in millions a text."""
    quality, cells, timed = QUALITY[found["task"]], by_cell(found), found["group"] == "gallery"
    dense = next((mean(rows, "multiply_adds") for (name, _), rows in cells.items() if name == "plain-6"), 1e6)
    titles = ["cell", "parameters", "multiply-adds", "mean depth", *(["ms a text"] if timed else []), NAMES[quality]]
    titles += [*(["BLEU"] if quality == "chrf" else []), "seeds"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for (name, depth), rows in cells.items():
        sides = dict.fromkeys(side for row in rows for side in row["mean_depth"])
        depths = (f"{statistics.fmean(row['mean_depth'][side] for row in rows):.2f}" for side in sides)
        values = [f"`{name}`" + (f" at {depth}" if found["group"] == "priors" else ""), f"{rows[0]['parameters']:,}"]
        values += [f"{mean(rows, 'multiply_adds') / dense:.2f}", " / ".join(depths)]
        values += [spread(rows, each) for each in ("milliseconds", quality, "bleu") if each in rows[0]]
        lines.append(f"| {' | '.join([*values, str(len(rows))])} |")
    for (name, _), rows in cells.items():
        for answer in rows[0].get("repeats", ()):
            read = [{"bits": row["repeats"][answer]} for row in rows]
            lines.append(f"| `{name}`, keys of {answer} | | | | {spread(read, 'bits')} | {len(rows)} |")
    return "\n".join(lines)

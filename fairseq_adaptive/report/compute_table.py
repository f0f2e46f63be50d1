"""The numbers of :func:`~fairseq_adaptive.report.compute_report.compute_report` as tables, and these as plain text."""

import os
import re
from typing import Any, Callable, Dict, List, NamedTuple, Optional

from fairseq_adaptive.printable import printable
from fairseq_adaptive.report.costs import PARTS

_ONE_DEPTH = re.compile(r"_\d+(_[afi])?$")  # logged of single depths, which have tables of their own


class Table(NamedTuple):
    """Names of columns, and rows of as many cells; the first column names the row."""

    title: str
    columns: List[str]
    rows: List[List[str]]


def names(report: Dict[str, Any]) -> List[str]:
    """What the models are called: their files, with as many folders as tell them apart; control characters as escapes."""
    paths = [os.path.normpath(each["checkpoint"]).split(os.sep) for each in report["models"]]
    for length in range(1, max(map(len, paths)) + 1):
        found = [os.sep.join(path[-length:]) for path in paths]
        if len(set(found)) == len(set(map(tuple, paths))):
            break
    return list(map(printable, found))


def overview(report: Dict[str, Any]) -> Table:
    """One row a number, one column a model."""
    models, rows = report["models"], []

    def row(label, read: Callable[[Dict], Optional[Any]], shown: Callable = str):
        values = [read(each) for each in models]
        if any(value is not None for value in values):
            rows.append([label, *("-" if value is None else shown(value) for value in values)])

    def beside(read: Callable[[Dict], Optional[float]]):
        return lambda model: None if model["counterpart"] is None else read(model["counterpart"])

    def ratio(read: Callable[[Dict], Optional[float]], upside_down=False):
        def found(model):
            if model["counterpart"] is None:
                return None
            own, dense = read(model), read(model["counterpart"])
            own, dense = (dense, own) if upside_down else (own, dense)
            return own / dense if own is not None and dense else None

        return found

    def total(each):
        return each["multiply_adds"]["total"]

    for name in ("architecture", "task", "criterion"):
        row(name, lambda model, name=name: model[name], printable)
    row("parameters, each once", lambda model: model["parameters"]["unique"], "{:,}".format)
    row("parameters, as often as used", lambda model: model["parameters"]["used"], "{:,}".format)
    row("texts measured", lambda model: model["texts"], "{:,}".format)
    row("tokens measured", lambda model: model["tokens"], "{:,}".format)
    row("multiply-adds a token", lambda model: total(model) / model["tokens"] if model["tokens"] else None, short)
    row("multiply-adds a text", lambda model: total(model) / model["texts"], short)
    for part in parts_of(report):
        row(f"  {part}", lambda model, part=part: model["multiply_adds"][part] / model["texts"], short)
    row(
        "  of the counterpart",
        lambda model: model["counterpart"] and total(model["counterpart"]) / model["texts"],
        short,
    )
    row("  share of the counterpart's", ratio(total), "{:.3f}".format)
    row("ms a text", lambda model: 1000 * model["seconds"] / model["texts"], "{:.3f}".format)
    row(
        "  of the counterpart",
        lambda m: m["counterpart"] and 1000 * m["counterpart"]["seconds"] / m["texts"],
        "{:.3f}".format,
    )
    row("  times as fast as it", ratio(lambda each: each["seconds"], True), "{:.2f}".format)
    row("peak memory, MiB", lambda model: model["peak_memory_bytes"], mebibytes)
    row("  of the counterpart", beside(lambda each: each["peak_memory_bytes"]), mebibytes)
    for name in dict.fromkeys(
        name for model in models for name in model["quality"] or {} if not _ONE_DEPTH.search(name)
    ):
        row(
            printable(name),
            lambda model, name=name: (model["quality"] or {}).get(name),
            lambda value: printable(str(value)),
        )
    threads = f"{report['threads']} thread{'s' * (report['threads'] != 1)}"
    where = f"{report['subset']}, batches of {report['batch_size']}, {report['device']}, {threads}"
    return Table(printable(where), ["", *names(report)], rows)


def parts_of(report: Dict[str, Any]) -> List[str]:
    """The parts of which some model has any."""
    return [part for part in PARTS if any(model["multiply_adds"][part] for model in report["models"])]


def by_depth(report: Dict[str, Any]) -> List[Table]:
    """A table for each stack of each model, a row a depth."""
    tables = []
    for model, name in zip(report["models"], names(report)):
        for stack, found in model["stacks"].items():
            columns = {
                "depth": lambda row: str(row["depth"]),
                "layer": lambda row: str(row["layer"]),
                "multiply-adds a text": lambda row: short(row["multiply_adds"]["total"] / model["texts"]),
                **{
                    part: lambda row, part=part: short(row["multiply_adds"][part] / model["texts"])
                    for part in PARTS[1:4]
                },
                "counterpart": lambda row: _number(row.get("counterpart_multiply_adds"), model["texts"]),
                **{
                    share: lambda row, share=share: _share(row[share]) for share in ("alive", "kept", "halted", "added")
                },
            }
            cells = {column: [show(row) for row in found["depths"]] for column, show in columns.items()}
            cells = {column: each for column, each in cells.items() if set(each) != {"-"}}
            title = f"{printable(stack)} of {name}: {found['mean_depth']:.2f} of {len(found['depths'])} depths a token"
            tables.append(Table(title, list(cells), [list(row) for row in zip(*cells.values())]))
    return tables


def short(number: float) -> str:
    """A number with four digits and a letter: k, M, G, T."""
    for letter in ("", "k", "M", "G"):
        if abs(number) < 9999.5:
            return f"{number:.4g}{letter}" if abs(number) < 999.95 else f"{number:.0f}{letter}"
        number /= 1000
    return f"{number:.4g}T"


def mebibytes(number: float) -> str:
    return f"{number / 2**20:.1f}"


def _number(value, texts):
    return "-" if value is None else short(value / texts)


def _share(value):
    return "-" if value is None else f"{value:.3f}"


def to_text(report: Dict[str, Any]) -> str:
    """All tables, in columns of one width for a terminal."""
    return "\n\n".join(map(_aligned, (overview(report), *by_depth(report))))


def _aligned(table: Table) -> str:
    lines = [table.columns, *table.rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    first, *rest = widths
    shown = (
        "  ".join((row[0].ljust(first), *(cell.rjust(width) for cell, width in zip(row[1:], rest)))) for row in lines
    )
    return "\n".join((table.title, *(line.rstrip() for line in shown)))

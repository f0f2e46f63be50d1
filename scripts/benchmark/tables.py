#!/usr/bin/env python3
"""Tables in Markdown of what all.py and kernels.py measured, the machines side by side.

A file MACHINE.json of all.py has every benchmark of a machine, a file kernels-MACHINE.json of kernels.py its operations.
Between "<!-- table: NAME -->" and "<!-- end -->" a page has the table of that benchmark, which --page writes anew.
"""

import argparse
import re
import sys
import tempfile
from pathlib import Path
from typing import Dict, List, Optional

from fairseq_adaptive.command import run
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.files import read_json, read_text
from fairseq_adaptive.ranges import Parser

QUIET = 0.05  # of a machine's processors, which others may take
KERNELS = "kernels"
_BEGIN = "<!-- table: "
_PART = re.compile(rf"{_BEGIN}(\S+) -->((?!{_BEGIN}).)*?<!-- end -->", re.DOTALL)
_KEY = ("case", "name", "against")
Found = Dict[str, Dict[str, Dict]]


def busy(share: Optional[float]) -> bool:
    """Whether others took so much that times by the clock say little; None where nobody knows."""
    return share is None or share > QUIET


def read_folder(folder) -> Found:
    """What the files of a folder hold: by benchmark, by machine.

    Raises:
        UsageError: when there is none, or one was written by something else
    """
    found: Found = {}
    for path in sorted(Path(folder).glob("*.json")):
        content, machine = read_json(path), path.stem.removeprefix(f"{KERNELS}-")
        if "ceilings" in content:
            content = {"benchmarks": {KERNELS: content}}
        try:
            for name, benchmark in content["benchmarks"].items():
                benchmark["rows"][0], benchmark["date"]
                speeds = content.get("products", {}).get("GFLOP/s", {})
                product = max((max(speeds[kind]) for kind in speeds if kind.startswith("fp32")), default=None)
                found.setdefault(name, {})[machine] = {**benchmark, "product": product}
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise UsageError(f"{path} was not written by all.py or kernels.py: {error!r}") from None
    if not found:
        raise UsageError(f"{folder} has no JSON file of all.py or kernels.py")
    return found


def text_of(machines: Dict[str, Dict]) -> str:
    """The tables of one benchmark, by machine, as Markdown."""
    if "ceilings" in next(iter(machines.values())):
        return "\n\n".join(map(kernel_table, machines.values()))
    return table(machines)


def three_digits(value: float) -> str:
    """Three that count, and all before the point: 0.612, 61.2, 2,280."""
    return f"{value:.3g}" if value < 999.5 else f"{float(f'{value:.3g}'):,.0f}"


def _cells(row: Optional[Dict], machine: Dict, memory: bool) -> List[str]:
    """Of one row and machine: milliseconds by the clock and of the processor, the ratio, shares and memory."""
    if row is None:
        return ["-"] * (3 + memory)
    by = "processor" if busy(machine["others"]) else "clock"
    seconds, ratio = (1e3 * row["seconds"][each]["median"] for each in ("clock", "processor")), row.get("ratio")
    reached = "-"
    if machine["product"] and "flops" in row:
        reached = f"{row['flops'] / row['seconds'][by]['median'] / machine['product'] / 1e9:.0%}"
    cells = [" / ".join(three_digits(each) for each in seconds)]
    if ratio is None:
        measured = any((each["case"], each.get("against")) == (row["case"], row["name"]) for each in machine["rows"])
        cells.append("1" if measured else "-")
    else:
        cells.append("{median:.2f} ({least:.2f} to {most:.2f})".format(**ratio[by]))
    used = [f"{row['memory_mib']:.0f}" if "memory_mib" in row else "-"] if memory else []
    return [*cells, reached, *used]


def table(machines: Dict[str, Dict]) -> str:
    """The rows of a benchmark that wrote them with :class:`record.Record`, one machine beside the other."""
    rows = {name: {tuple(map(row.get, _KEY)): row for row in machine["rows"]} for name, machine in machines.items()}
    memory = any("memory_mib" in row for of_one in rows.values() for row in of_one.values())
    columns = ["ms, clock / processor", "times as fast (rounds)", "of a product in fp32", *["peak MiB"] * memory]
    heads = [f"{name}: {column}" for name in machines for column in columns]
    lines = ["| " + " | ".join(["case", "what", "beside", *heads]) + " |", "|---" * (3 + len(heads)) + "|"]
    keys = list(dict.fromkeys(key for of_one in rows.values() for key in of_one))
    cases = list(dict.fromkeys(case for case, _, _ in keys))
    for key in sorted(keys, key=lambda each: cases.index(each[0])):
        cells = [cell for name, of_one in rows.items() for cell in _cells(of_one.get(key), machines[name], memory)]
        lines.append("| " + " | ".join([*(each or "-" for each in key), *cells]) + " |")
    return "\n".join([*lines, "", *(_about(name, machine) + "\\" for name, machine in machines.items())])[:-1]


def _about(name: str, machine: Dict) -> str:
    there = [f"{package} {version}" for package, version in machine["versions"].items() if version]
    others = (
        "nobody knows how busy others kept it" if machine["others"] is None else f"others took {machine['others']:.0%}"
    )
    compared = "ratios and shares of processor time" if busy(machine["others"]) else "ratios and shares by the clock"
    commit = f"commit {machine['commit'] or 'unknown'}"
    threads = f"{machine['threads']} of {machine['processors']} threads"
    return f"{name}: {machine['processor']}, {threads}, {', '.join(there)}, {commit}, {machine['date']}; {others}: {compared}."


def kernel_table(found: Dict) -> str:
    """What a run of kernels.py found."""
    columns = "operation, type, pass, naive in ms, compiled, torch's, ours, speed of ours, of the ceiling, peak MiB"
    lines = ["| " + columns.replace(", ", " | ") + " |", "|---" * 10 + "|"]
    for row in found["rows"]:
        ways, ours = row["ways"], row["ways"]["ours"]
        times = [
            f"{three_digits(each['seconds'] * 1e3)} ({each['naive_over_it']:.2f} x)" if each else "-"
            for each in (ways.get("compiled"), ways.get("library"), ours)
        ]
        rate = row["least"] / ours["seconds"]
        prefix, factor = ("T", 1e12) if rate > 1e12 else ("G", 1e9)
        memory = ", ".join(f"{name} {each['peak_mib']:.0f}" for name, each in ways.items())
        lines.append(
            f"| `{row['operation']}`, {row['shape']} | {row['type']} | {row['pass']} | "
            f"{three_digits(ways['naive']['seconds'] * 1e3)} | {' | '.join(times)} | "
            f"{rate / factor:.3g} {prefix}{row['unit']}, {row['backend']} | {rate / row['ceiling']:.0%} | {memory} |"
        )
    differences = [
        way["gradient_difference"]
        for row in found["rows"]
        if row["type"] == "fp32"
        for way in row["ways"].values()
        if "gradient_difference" in way
    ]
    lines += [
        "",
        f"{found['device']}, time {found['clock']}, torch {found['versions']['torch']}, {found['date']}, medians "
        f"of {found['rounds']} rounds.",
    ]
    if differences:
        lines.append(
            f"In fp32 gradients differ from those of the definition by at most {max(differences):.0e} of their norm."
        )
    for kind, (copied, multiplied) in found["ceilings"].items():
        lines.append(f"Ceilings for {kind}: copy {copied / 1e9:.3g} GB/s, product {multiplied / 1e9:.3g} GFLOP/s.")
    return "\n".join(lines)


def with_tables(page: str, found: Found) -> str:
    """A page with its tables as the files give them.

    Raises:
        UsageError: when a table has no file, or no end
    """

    def written(part):
        if part[1] not in found:
            raise UsageError(f"the page has a table {part[1]}, which no file has: there are {', '.join(sorted(found))}")
        return f"{_BEGIN}{part[1]} -->\n\n{text_of(found[part[1]])}\n\n<!-- end -->"

    changed, count = _PART.subn(written, page)
    if count != page.count(_BEGIN):
        raise UsageError("a table of the page does not end with <!-- end -->")
    return changed


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with JSON files, such as docs/benchmarks")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="tables of these benchmarks (default: all)")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the tables that this page has, and print none")
    args = parser.parse_args()
    found = read_folder(args.folder)
    unknown = sorted(set(args.only or ()) - set(found))
    if unknown:
        raise UsageError(f"no file has {', '.join(unknown)}: there are {', '.join(sorted(found))}")
    if args.page is None:
        for name in args.only or found:
            sys.stdout.write(f"{_BEGIN}{name} -->\n\n{text_of(found[name])}\n\n<!-- end -->\n\n")
        return
    page = read_text(args.page)
    changed = with_tables(page, found)
    if changed == page:
        return print(f"{args.page} has these tables")
    with tempfile.TemporaryDirectory(dir=args.page.parent) as folder:
        part = Path(folder, args.page.name)
        part.write_text(changed, encoding="utf-8")
        part.replace(args.page)
    print("wrote", args.page)


if __name__ == "__main__":
    run(main)

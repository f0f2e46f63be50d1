"""What benchmarks record, how quiet a machine must be, one run of them all, and the tables that pages have of it."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from fairseq_adaptive.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts" / "benchmark"


def test_numbers_have_three_digits_and_no_exponent(script):
    found = map(script("tables").three_digits, (0.6123, 61.23, 612.3, 999.4, 999.6, 2284.0, 123456.0))
    assert list(found) == ["0.612", "61.2", "612", "999", "1,000", "2,280", "123,000"]


def test_a_command_names_its_script_from_the_root(script, monkeypatch):
    record = script("record")
    for given in (SCRIPTS / "tape.py", "/elsewhere/tape.py"):
        monkeypatch.setattr(sys, "argv", [str(given), "--rounds", "3"])
        where = "scripts/benchmark/" if given == SCRIPTS / "tape.py" else ""
        assert record.said() == f"python {where}tape.py --rounds 3"


@pytest.mark.parametrize(
    "path", sorted((ROOT / "docs" / "benchmarks").rglob("*.json")), ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_committed_files_name_no_folder_of_one_machine(path):
    assert not re.findall(r'(?<![\w.-])/(?:work|tmp|root|home)/[^" ]*', path.read_text())


def test_rows_are_the_rounds(script, tmp_path):
    record = script("record")
    stock = [record.Seconds(clock, 2 * clock) for clock in (4.0, 6.0, 5.0)]
    ours = [record.Seconds(clock, clock) for clock in (2.0, 2.0, 1.0)]
    book = record.Record(str(tmp_path / "found.json"))
    book.add("8 x 128", {"stock": stock, "ours": ours}, "stock", flops={"ours": 6e9}, texts=8)
    book.write()
    found = json.loads((tmp_path / "found.json").read_text())
    first, second = found["rows"]
    assert first["seconds"]["clock"] == {"median": 5, "least": 4, "most": 6} and first["rounds"] == 3
    assert first["texts"] == second["texts"] == 8 and "flops" not in first and second["flops"] == 6e9
    assert "ratio" not in first and second["against"] == "stock"
    assert second["ratio"]["clock"] == {"median": 3, "least": 2, "most": 5}
    assert second["ratio"]["processor"] == {"median": 6, "least": 4, "most": 10}
    assert found["threads"] >= 1 and found["versions"]["torch"] and 0 <= found["others"] <= 1
    with pytest.raises(UsageError, match="found.json exists"):
        record.Record(str(tmp_path / "found.json"))


def test_turns_alternate_and_sleep_takes_no_processor_time(script):
    record, called = script("record"), []
    ways = {name: lambda name=name: called.append(name) or time.sleep(0.02) for name in "ab"}
    times = record.in_turn(ways, 2, warm=1)
    assert called == list("ababab") and all(len(measured) == 2 for measured in times.values())
    assert all(each.clock >= 0.02 and each.processor < 0.02 for measured in times.values() for each in measured)


def test_others_are_all_but_this_process(script, monkeypatch):
    record = script("record")
    reads = iter([(100.0, 10.0, 1000.0), (104.0, 13.0, 1008.0), (100.0, 13.0, 1008.0)])
    monkeypatch.setattr(record.Others, "_read", staticmethod(lambda: next(reads)))
    others = record.Others()
    assert others.share() == 1 / 8  # four seconds of processors were used, three of them here
    assert others.share() == 0  # the two are not read at once


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="the system does not say how busy it is")
def test_a_busy_process_is_seen(script):
    record = script("record")
    burner = subprocess.Popen([sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE)
    try:
        burner.stdout.readline()
        others = record.Others()
        time.sleep(1)
        assert others.share() > 0.3 / os.cpu_count()
    finally:
        burner.kill()
        burner.communicate()


def test_json_has_what_is_printed(script, tmp_path, capsys, call):
    module, small = script("single_token"), script("runs").SMALL["single_token.py"].split()
    with module.torch.no_grad():
        call(module, *small, "--rounds", 3, "--processor-time", "--json", tmp_path / "found.json")
    shown = re.findall(r"batch (\d+), (.+?): (\S+) ms a step, (\S+) of no rule", capsys.readouterr().out)
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert len(shown) == len(rows) == 3
    for (batch, name, milliseconds, _), row in zip(shown, rows):
        assert (row["case"], row["name"], row["rounds"]) == (f"a step, batch {batch}", name, 3)
        assert f"{1e3 * row['seconds']['processor']['median']:.2f}" == milliseconds


@pytest.fixture
def everything(script, tmp_path, monkeypatch):
    """all.py, whose benchmarks write a row and do nothing; and the commands that were run."""
    module, ran = script("all"), []

    def run(words, env):
        ran.append(Path(words[1]).name)
        content = {"command": " ".join(["python", *words[1:]]), "others": 0.01, "rows": [{}], "date": "today"}
        Path(words[-1]).write_text(json.dumps(content))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(module, "subprocess", SimpleNamespace(run=run))
    monkeypatch.setattr(module, "products", lambda threads: {"sizes": [], "GFLOP/s": {"fp32 torch": [1.0, 100.0]}})
    monkeypatch.setattr(module.Others, "share", lambda self: 0.0)
    monkeypatch.chdir(tmp_path)
    return module, ran


def test_an_interrupted_run_goes_on(everything, capsys, tmp_path, call):
    module, ran = everything
    flags = ("--small", "--output", "machine.json", "--only")
    call(module, *flags, "packing", "tape", "--dry-run")
    assert ran == [] and re.search(r"tape: python .*tape.py --arch", capsys.readouterr().out)
    assert not list(tmp_path.iterdir())
    call(module, "--small", "--output", "one.json", "--only", "packing")
    call(module, *flags, "packing", "tape", "decoding")
    assert ran == ["packing.py", "tape.py"]
    out = capsys.readouterr().out
    assert "packing.json is there and is kept" in out
    assert "decoding: left out, since there is no --translation-data and no --translation-checkpoint" in out
    found = json.loads(Path("machine.json").read_text())
    assert list(found["benchmarks"]) == ["packing", "tape"] and found["machine"]["threads"] == 1
    with pytest.raises(UsageError, match="packing.json was made by another command"):
        call(module, "--output", "large.json", "--only", "packing")
    with pytest.raises(UsageError, match="machine.json exists"):
        call(module, *flags, "tape")


def test_a_busy_machine_is_refused(everything, monkeypatch, call):
    module, ran = everything
    monkeypatch.setattr(module.Others, "share", lambda self: 0.52)
    with pytest.raises(UsageError, match="others take 52% of the processors before packing"):
        call(module, "--small", "--output", "machine.json", "--only", "packing")
    assert ran == []
    call(module, "--small", "--output", "machine.json", "--only", "packing", "--busy")
    assert ran == ["packing.py"]


def test_figures_of_a_busy_machine_are_thrown_away(everything, monkeypatch, call):
    module, ran = everything
    monkeypatch.setattr(module, "QUIET", 0.005)
    monkeypatch.setattr(module, "busy", lambda share: share > 0.005)
    with pytest.raises(UsageError, match="during packing, whose figures are thrown away"):
        call(module, "--small", "--output", "machine.json", "--only", "packing")
    assert ran == ["packing.py"] and not Path("benchmark-parts/packing.json").exists()


def test_every_benchmark_can_be_told_all_it_needs(script):
    runs = script("runs")
    told = {name: [f"/{name}"] for name in runs.NEEDS} | {"threads": ["2"]}
    for each in runs.RUNS:
        assert (SCRIPTS / each.script).is_file() and each.script in runs.SMALL
        words, why = runs.command(each._replace(module=None), told, small=False)
        assert words[0] == each.script and why == "" and "{" not in " ".join(words)
    without, why = runs.command(next(each for each in runs.RUNS if each.name == "halting"), {}, small=False)
    assert without == ["halting.py"] and why == "without that peer, since there is no --albert-act"


def row(name, clock, against=None, **figures):
    seconds = {by: {"median": clock, "least": clock, "most": clock} for by in ("clock", "processor")}
    ratio = {by: {"median": 2.0, "least": 1.5, "most": 2.5} for by in ("clock", "processor")}
    ratio["processor"]["median"] = 3.0
    compared = {"against": against, "ratio": ratio} if against else {}
    return {"case": "8 x 128", "name": name, "seconds": seconds, **compared, **figures}


def test_machines_stand_side_by_side(script, tmp_path):
    tables = script("tables")
    about = {
        "processor": "P",
        "processors": 4,
        "threads": 1,
        "versions": {"torch": "2.13"},
        "commit": "abc",
        "date": "today",
    }
    for name, others, rows in (
        ("quiet", 0.01, [row("stock", 0.2), row("ours", 0.1, "stock", flops=4e9)]),
        ("loud", 0.5, [row("ours", 0.05, "stock")]),
    ):
        skimming = {**about, "others": others, "rows": rows}
        content = {"products": {"GFLOP/s": {"fp32 torch": [50.0, 80.0]}}, "benchmarks": {"skimming": skimming}}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    lines = tables.text_of(tables.read_folder(tmp_path)["skimming"]).split("\n")
    assert "| 8 x 128 | stock | - | - | - | - | 200 / 200 | 1 | - |" in lines
    # the ratio is of processor time where others were busy; 40 GFLOP/s are half of 80
    assert (
        "| 8 x 128 | ours | stock | 50 / 50 | 3.00 (1.50 to 2.50) | - | 100 / 100 | 2.00 (1.50 to 2.50) | 50% |"
        in lines
    )
    assert lines[-1].startswith(
        "quiet: P, 1 of 4 threads, torch 2.13, commit abc, today; others took 1%: ratios and shares by"
    )
    page = "a\n<!-- table: skimming -->\n\nold\n\n<!-- end -->\nb\n"
    made = tables.with_tables(page, tables.read_folder(tmp_path))
    assert "old" not in made and "200 / 200" in made and made == tables.with_tables(made, tables.read_folder(tmp_path))
    empty = "<!-- table: skimming -->\n\n<!-- end -->\nb\n"  # of a table without lines, as a new page has it
    assert tables.with_tables(empty + page, tables.read_folder(tmp_path)) == made.removeprefix("a\n") + made
    with pytest.raises(UsageError, match="does not end with <!-- end -->"):
        tables.with_tables(page.replace("<!-- end -->", "") + page, tables.read_folder(tmp_path))
    with pytest.raises(UsageError, match="a table tape, which no file has: there are skimming"):
        tables.with_tables(page.replace("skimming", "tape"), tables.read_folder(tmp_path))
    (tmp_path / "other.json").write_text('{"benchmarks": {"tape": {}}}')
    with pytest.raises(UsageError, match="other.json was not written by all.py"):
        tables.read_folder(tmp_path)


@pytest.mark.parametrize("name, table", [("performance", "kernels"), ("benchmarks", "skimming-int8")])
def test_the_page_has_what_the_files_give(script, name, table):
    tables = script("tables")
    page = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    assert f"<!-- table: {table} -->" in page
    found = tables.read_folder(ROOT / "docs" / "benchmarks")
    command = f"python scripts/benchmark/tables.py docs/benchmarks --page docs/{name}.md"
    assert tables.with_tables(page, found) == page, command

"""examples/translation/records: what a record takes is that of all its processes, and the board is what its files say."""

import json
import subprocess
import sys

import pytest

from cli.wmt14 import EXAMPLE
from fairseq_adaptive.errors import UsageError

RECORDS = EXAMPLE / "records"


@pytest.fixture(scope="module")
def scripts():
    sys.path.insert(0, str(RECORDS))
    try:
        import board
        import measure

        yield board, measure
    finally:
        sys.path.remove(str(RECORDS))
        for name in ("board", "measure"):
            sys.modules.pop(name, None)


def result(folder, name, minutes, bleu):
    seeds = [
        {"seed": n, "core_minutes": one, "minutes": one / 2, "bleu": two}
        for n, (one, two) in enumerate(zip(minutes, bleu))
    ]
    machine = {"processor": "A Processor", "processors": 2, "threads": 1, "date": "2026-01-02"}
    (folder / name).mkdir()
    (folder / name / "result.json").write_text(json.dumps({"machine": machine, "command": "", "seeds": seeds}))
    return folder / name


def test_the_fewest_core_minutes_come_first(scripts, tmp_path):
    slow, fast = result(tmp_path, "slow", (9, 10, 11), (34, 35, 33)), result(tmp_path, "fast", (2, 4), (33.2, 33.4))
    lines = scripts[0].board([slow, fast]).split("\n")
    assert (
        lines[2]
        == "| `fast` | 3.0 (2.0 to 4.0) | 1.5 | 33.30 of 2 seeds | 33.20 | 1 of 2 cores, A Processor | 2026-01-02 |"
    )
    assert lines[3].startswith("| `slow` | 10.0 (9.0 to 11.0) | 5.0 | 34.00 of 3 seeds | 33.00 |")
    with pytest.raises(UsageError, match="other.*result.json is missing: measure.py makes it"):
        scripts[0].board([slow, tmp_path / "other"])
    (slow / "result.json").write_text("{}")
    with pytest.raises(UsageError, match="was not written by measure.py: KeyError"):
        scripts[0].board([slow])


def test_the_page_has_the_board_of_its_files(scripts):
    folders = sorted(path.parent for path in RECORDS.glob("*/result.json"))
    page = (RECORDS / "README.md").read_text(encoding="utf-8")
    assert scripts[0].board(folders) in page if folders else "No record stands yet." in page


def test_time_is_that_of_processes_within_processes(scripts, tmp_path):
    burn = f"{sys.executable} -c 'import time\nwhile time.process_time() < 0.2: pass'"
    used, clock = scripts[1].timed(["bash", "-c", f"{burn} & {burn}; wait; echo done"], tmp_path / "log", None)
    assert 0.4 <= used < 1.2 and clock >= 0.2
    assert (tmp_path / "log").read_text() == "done\n"
    with pytest.raises(UsageError, match="ended with status 3: see .*log2"):
        scripts[1].timed(["bash", "-c", "exit 3"], tmp_path / "log2", None)


def test_an_unfinished_training_is_refused_and_a_finished_one_kept(tmp_path):
    data, raw, out = tmp_path / "data", tmp_path / "raw", tmp_path / "out"
    for path in (data / "bin" / "dict.de.txt", raw / "test.de"):
        path.parent.mkdir(parents=True)
        path.touch()
    (out / "1").mkdir(parents=True)
    command = [
        sys.executable,
        str(RECORDS / "measure.py"),
        str(RECORDS / "universal-3"),
        str(data),
        str(raw),
        str(out),
        "--seeds",
        "1",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0 and "was not finished: remove it" in done.stderr and "Traceback" not in done.stderr
    (out / "1.json").write_text(json.dumps({"seed": 1, "core_minutes": 5.0, "minutes": 5.1, "bleu": 33.25}))
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "seed 1: 33.25 BLEU in 5.0 core-minutes" in done.stdout
    found = json.loads((out / "result.json").read_text())
    assert found["seeds"][0]["bleu"] == 33.25 and "train-multi30k.sh" in found["command"]

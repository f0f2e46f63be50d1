"""What a benchmark measured, as a JSON file: by the clock and by processor time, and how busy others kept the machine."""

import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional

from fairseq_adaptive.files import require_new, whole_file

PACKAGES = ("torch", "numpy", "transformers", "onnxruntime", "ctranslate2", "pymarian")  # ours needs, or peers are
Times = Dict[str, List["Seconds"]]


class Seconds(NamedTuple):
    """What a call took: by the clock, and of the processor in this process."""

    clock: float
    processor: float

    def per(self, count) -> "Seconds":
        return Seconds(self.clock / count, self.processor / count)


CLOCKS = Seconds._fields


def spent(call: Callable) -> Seconds:
    """Call a function, which waits for the device that it computes on, and return its seconds."""
    processor, clock = time.process_time(), time.perf_counter()
    call()
    return Seconds(time.perf_counter() - clock, time.process_time() - processor)


def in_turn(ways: Dict[str, Callable], rounds: int, warm: int = 0) -> Times:
    """The seconds of several functions, of which each is called once a round.

    Args:
        ways: by their names
        warm: rounds before those that count
    """
    found = [{name: spent(call) for name, call in ways.items()} for _ in range(warm + rounds)][warm:]
    return {name: [each[name] for each in found] for name in ways}


def median(times: List[Seconds], by: str = "clock") -> float:
    return statistics.median(getattr(each, by) for each in times)


def ratios(theirs: List[Seconds], ours: List[Seconds], by: str = "clock") -> List[float]:
    """How many times as fast ours is as theirs, round by round, in ascending order."""
    pairs = zip(theirs, ours, strict=True)
    return sorted(getattr(their, by) / max(getattr(our, by), 1e-9) for their, our in pairs)


def add_json(parser) -> None:
    parser.add_argument("--json", metavar="FILE", help="write what was measured there, too; must not exist")


class Others:
    """How much of the machine's processors others take from now on, other virtual machines included."""

    def __init__(self):
        self._start = self._read()

    @staticmethod
    def _read():
        """Seconds of processors: of anyone and of this process with the children that have ended, and those there are."""
        try:
            fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
        except OSError:
            return None  # there is none but on Linux
        user, nice, system, idle, wait, irq, soft, steal = (int(each) / os.sysconf("SC_CLK_TCK") for each in fields)
        used = user + nice + system + irq + soft + steal
        return used, sum(os.times()[:4]), used + idle + wait

    def share(self) -> Optional[float]:
        """Between 0 and 1; None where the system does not say."""
        now = self._read()
        if now is None or self._start is None:
            return None
        used, own, there = (after - before for before, after in zip(self._start, now))
        return min(max((used - own) / there, 0.0), 1.0) if there > 0 else 0.0


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def version(package: str) -> Optional[str]:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def said() -> str:
    """The command of this process, its script as it is named from the root of the repository."""
    script, root = Path(sys.argv[0]).resolve(), Path(__file__).resolve().parents[2]
    name = str(script.relative_to(root)) if script.is_relative_to(root) else script.name
    return shlex.join(["python", name, *sys.argv[1:]])


def commit() -> Optional[str]:
    """Of the checkout that this script is in, with -dirty where files differ from it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def machine(threads: int) -> Dict:
    """What a figure depends on beside the benchmark."""
    return {
        "processor": processor(),
        "processors": os.cpu_count(),
        "threads": threads,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "commit": commit(),
        "date": date.today().isoformat(),
    }


def spread(values: List[float]) -> Dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def write_json(path, content) -> None:
    with whole_file(path) as part, open(part, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.write("\n")


class Record:
    """The rows of one run of a benchmark.

    Args:
        path: of the file that :meth:`write` writes; None: none is

    Raises:
        UsageError: when there is such a file
    """

    def __init__(self, path: Optional[str] = None):
        self.path, self.rows = path and require_new(path), []
        self._others = Others()

    def add(self, case: str, times: Times, against: Optional[str] = None, **figures) -> None:
        """Add a row for each name.

        Args:
            case: what was computed: sizes, for instance
            times: seconds of each round
            against: the name with which the others are compared
            figures: what else is known (``flops``, ``memory_mib``), of all of them or, as a dict, of some
        """
        for name, measured in times.items():
            row = {"case": case, "name": name, "rounds": len(measured), "seconds": {}}
            for by in CLOCKS:
                row["seconds"][by] = spread([getattr(each, by) for each in measured])
            if against is not None and name != against:
                row["against"] = against
                row["ratio"] = {by: spread(ratios(times[against], measured, by)) for by in CLOCKS}
            for figure, value in figures.items():
                if not isinstance(value, dict):
                    row[figure] = value
                elif name in value:
                    row[figure] = value[name]
            self.rows.append(row)

    def write(self) -> None:
        if self.path is None:
            return
        import torch

        about = {"command": said(), **machine(torch.get_num_threads())}
        write_json(self.path, {**about, "others": self._others.share(), "rows": self.rows})

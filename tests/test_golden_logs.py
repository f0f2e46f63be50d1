"""What each family's criterion logs of its first three updates: names and values of today's log.

Values move by rounding alone where sums are taken in another order. A change that is meant to move them records them
again, and its commit says why::

    python tests/test_golden_logs.py [CASE ...]
"""

import json
import sys
import tempfile
from pathlib import Path

import pytest

if __name__ == "__main__":
    import conftest  # noqa: F401  what pytest imports before a test

from families import FAMILIES, build_trainer, train, write_data  # noqa: E402

GOLDEN = Path(__file__).parent / "golden_logs.json"
UPDATES = 3
# family and further flags
CASES = {
    **{name: (name, "") for name in FAMILIES},
    "target_depth": ("universal_transformer", "--target-depth 2.5 --target-depth-rate 0.1"),
    "time_penalty_warmup": ("albert_act", "--time-penalty-warmup-updates 4 --halting ut_act"),
    "pondernet_and_act": ("pondernet", "--decoder-halting act --prior-rate 0.4"),
    "target_flops": ("transkimmer", "--target-flops 0.5 --skim-warmup-updates 4"),
    "tape_in_ponder_loss": (
        "adatape_parity",
        "--halting act --criterion ponder_loss --task-criterion tape_ponder_loss",
    ),
    "tape_in_skim_loss": ("adatape_vit", "--skimming --criterion skim_loss --task-criterion tape_ponder_loss"),
    "entropy_warmup": ("par_supernet", "--entropy-warmup-updates 4 --sample-paths"),
}
TIMES = ("wall", "train_wall", "wps", "ups", "clip", "loss_scale", "gb_free")


def logs(case, data):
    """Of each update what fairseq logs, and what the criterion gave it."""
    family, flags = CASES[case]
    trainer, batches = build_trainer(family, data, "--max-update", "10", *flags.split())
    raw = []
    trainer.criterion.register_forward_hook(
        lambda module, arguments, result: raw.append({key: float(value) for key, value in result[2].items()})
    )
    logged = train(trainer, batches, UPDATES)
    return [
        {"log": {key: value for key, value in each.items() if key not in TIMES}, "sums": sums}
        for each, sums in zip(logged, raw, strict=True)
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("families"))


@pytest.mark.parametrize("case", CASES)
def test_logs_are_those_recorded(case, data):
    golden, found = json.loads(GOLDEN.read_text())[case], logs(case, data)
    for before, after in zip(golden, found, strict=True):
        for part, values in before.items():
            assert after[part].keys() == values.keys()
            assert after[part] == pytest.approx(values, rel=1e-4, abs=2e-4)  # a logged 0.5 may round to 0.4999


def main(names):
    recorded = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        data = write_data(Path(folder))
        recorded.update({name: logs(name, data) for name in names or CASES})
    lines = [f'  "{name}": {json.dumps(values)}' for name, values in sorted(recorded.items())]
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main(sys.argv[1:])

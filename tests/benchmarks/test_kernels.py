"""The benchmark of fused operations, at sizes that only show that it runs."""

import json

import pytest

from fairseq_adaptive.ops import OPS


def test_measures_once_and_prints_the_table(script, tmp_path, capsys, call):
    kernels = script("kernels")

    def run(*arguments):
        call(kernels, *arguments)
        return capsys.readouterr().out

    file = tmp_path / "new" / "found.json"
    measure = ("--device", "cpu", "--small", "--no-compile", "--rounds", 1, "--types", "fp32", "bf16", "--output", file)
    shown = run(*measure)
    assert "| `halting_update`, 9 x 8 | fp32 | both |" in shown and shown == run("--table", file)
    with pytest.raises(SystemExit):
        run(*measure)
    assert f"{file} is there already" in capsys.readouterr().err

    found = json.loads(file.read_text())
    assert {row["operation"] for row in found["rows"]} <= set(OPS)
    assert found["command"].endswith(str(file)) and found["versions"]["torch"]
    for row in found["rows"]:
        assert {"naive", "ours"} <= set(row["ways"]) <= {"naive", "ours", "library"}
        assert row["least"] > 0 and row["backend"] == "torch"
        assert row["ways"]["naive"]["naive_over_it"] == 1 and row["ways"]["ours"]["seconds"] > 0
        if row["type"] == "fp32":
            assert row["ways"]["ours"].get("gradient_difference", 0) < 1e-5

"""PAR Transformer-XL with shared blocks that halt, through fairseq-train."""

import pytest

from cli.test_segmented_language_modeling import data, saved, train  # noqa: F401


@pytest.mark.parametrize(
    "rule, more", [("act", ()), ("pondernet", ()), ("act", ("--adaptive-softmax-cutoff", "10,20"))]
)
def test_training(data, tmp_path, rule, more):  # noqa: F811
    inner = ("--task-criterion", "adaptive_cross_entropy") if more else ("--task-criterion", "cross_entropy")
    train(
        data,
        tmp_path,
        "--batch-size",
        "4",
        "--layout",
        "af*3",
        "--decoder-unique-layers",
        "2",
        "--halting",
        rule,
        "--criterion",
        "ponder_loss",
        *inner,
        *more,
    )
    names = saved(tmp_path)["model"]
    assert {name.split(".")[2] for name in names if ".blocks." in name} == {"0", "1", "halting"}

"""Policies from the command line's flags to a trained model, as fairseq-train reads them."""

import pytest

from families import build_trainer, train, write_data

CASES = {
    "shared_transformer": (
        "--router",
        "mixture_of_depths",
        "--router-args",
        '{"capacity": 0.5}',
        "--encoder-halting",
        "saturation",
        "--encoder-router",
        "skimming",
        "--reader",
        "tape",
        "--encoder-reader-args",
        '{"tokens": 4, "bank_size": 20}',
    ),
    "shared_transformer_lm": ("--router", "skimming", "--router-args", '{"bias": 1.0}', "--router-kv", "recompute"),
    "universal_transformer": (
        "--halting-kv",
        "first",
        "--halting-args",
        '{"bias": -1}',
        "--decoder-router",
        "skimming",
        "--decoder-halting-kv",
        "keep",
    ),
    "par_transformer_xl": ("--halting", "ut_act", "--decoder-unique-layers", "3"),
    "par_transformer_xl ": (
        "--router",
        "mixture_of_recursions",
        "--layout",
        "af*4",
        "--layer-sharing",
        "middle_cycle",
        "--decoder-unique-layers",
        "4",
        "--halting",
        "act",
        "--halting-after",
        "f",
        "--halting-kv",
        "active",
        "--criterion",
        "adaptive_compute_loss",
        "--task-criterion",
        "adaptive_cross_entropy",
    ),
    "par_supernet": ("--halting", "act", "--temperature-updates", "10"),
    "transkimmer": ("--halting", "act", "--skim-bias", "0"),
    "albert_act": ("--router", "mixture_of_depths", "--router-kv", "active", "--halting-kv", "keep"),
    "adatape_vit": ("--halting", "act", "--router", "skimming", "--tape-layer", "1"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("policies"))


@pytest.mark.parametrize("name", CASES)
def test_trains_by_flags(name, folder):
    trainer, batches = build_trainer(name.strip(), folder, *CASES[name])
    logged = train(trainer, batches, 12)
    assert logged[-1]["loss"] < logged[0]["loss"]
    if "adaptive_compute_loss" in CASES[name]:
        assert 0 < logged[-1]["mixture_of_recursions_flops"] < 1 <= logged[-1]["act_depth"] <= 4

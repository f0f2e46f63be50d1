"""--model-overrides reach flags that a checkpoint is too old to have; what nothing reads is told."""

import argparse
import dataclasses
import logging

import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.models import MODEL_DATACLASS_REGISTRY

FAMILIES = sorted(
    name for name, each in MODEL_DATACLASS_REGISTRY.items() if each.__module__.startswith("fairseq_adaptive")
)


def read(tmp_path, model, **overrides):
    """The flags of the model in a checkpoint, as fairseq reads it."""
    cfg = {"model": model, "task": {"_name": "language_modeling", "tokens_per_sample": 8}}
    state = {"cfg": cfg, "model": {"weight": torch.zeros(1)}, "args": None}
    names = {"criterion_name": "CrossEntropyCriterion", "optimizer_name": "FairseqAdam"}
    state["optimizer_history"] = [{**names, "lr_scheduler_state": {}, "num_updates": 0}]
    state["extra_state"] = {"train_iterator": {"epoch": 1, "iterations_in_epoch": 0}}
    torch.save(state, tmp_path / "checkpoint.pt")
    return checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "checkpoint.pt"), overrides)["cfg"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_flag_of_a_model_can_be_overridden_in_a_checkpoint_without_it(family, tmp_path, caplog):
    fields = [each.name for each in dataclasses.fields(MODEL_DATACLASS_REGISTRY[family]) if each.name != "_name"]
    overrides = {name: f"value of {name}" for name in fields if name not in ("data", "tokens_per_sample")}
    with caplog.at_level(logging.WARNING):
        cfg = read(tmp_path, {"_name": family}, **overrides)
    assert {name: cfg.model.get(name) for name in overrides} == overrides and len(overrides) > 5
    assert "changes nothing" not in caplog.text


def test_a_preset_is_found(tmp_path):
    assert read(tmp_path, {"_name": "adatape_vit_s16"}, int8=True).model.int8 is True


def test_a_misspelt_flag_is_told(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        cfg = read(tmp_path, {"_name": "shared_transformer_lm", "dropout": 0.1}, droput=0.3, tokens_per_sample=9)
    assert cfg.model.dropout == 0.1 and cfg.task.tokens_per_sample == 9
    assert caplog.text.count("changes nothing") == 1 and "no flag 'droput'" in caplog.text


def test_flags_of_argparse_take_anything(tmp_path, caplog):
    model = argparse.Namespace(arch="shared_transformer", _name="shared_transformer")
    with caplog.at_level(logging.WARNING):
        assert read(tmp_path, model, new=3).model.new == 3
    assert "changes nothing" not in caplog.text

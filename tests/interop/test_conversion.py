"""What all conversions have in common: nothing of a model is lost without a word, and what was written is read back."""

import argparse
import json

import pytest
import torch
from families import build_trainer, write_data

from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.interop import albert_act, bert, transfo_xl
from fairseq_adaptive.interop.conversion import Weights


@pytest.mark.parametrize(
    "module", (albert_act, bert, transfo_xl), ids=lambda module: module.__name__.rpartition(".")[2]
)
def test_weights_without_a_place_are_refused_by_name(module):
    tensors = {"a": torch.ones(2), "tied": torch.ones(2), **{f"{name}x": torch.zeros(3) for name in module.UNUSED}}
    weights = Weights(tensors)
    weights.take("a", 2)
    weights.require_used(module.UNUSED)
    weights = Weights({**tensors, "encoder.layer.0.adapter.weight": torch.zeros(2)})
    weights.take("a", 2)
    with pytest.raises(UsageError, match=r"hold encoder\.layer\.0\.adapter\.weight, which the converted model"):
        weights.require_used(module.UNUSED)


def test_a_folder_that_computes_something_else_is_not_written(tmp_path, monkeypatch):
    trainer, _ = build_trainer("albert_act", write_data(tmp_path / "data"))
    trainer._gathered_optim_state = None
    trainer.save_checkpoint(str(tmp_path / "model.pt"), {"train_iterator": {"epoch": 1, "iterations_in_epoch": 0}})
    args = argparse.Namespace(input=tmp_path / "model.pt", output=tmp_path / "published", spm=None)
    save = albert_act.save_tensors

    def save_another(tensors, path):
        name = "albert.encoder.albert_layer.ffn.bias"
        save({**tensors, name: tensors[name] + 1}, path)

    monkeypatch.setattr(albert_act, "save_tensors", save_another)
    with pytest.raises(UsageError, match="what is read from the folder computes something else, its outputs differ by"):
        albert_act.convert_back(args)
    assert not (tmp_path / "published").exists()
    monkeypatch.setattr(albert_act, "save_tensors", save)
    albert_act.convert_back(args)
    assert json.loads((tmp_path / "published" / "config.json").read_text())["model_type"] == "albert_act"

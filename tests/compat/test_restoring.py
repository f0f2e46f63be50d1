"""A checkpoint to go on from that is not there, or of another training, is refused in one line."""

import os
from types import SimpleNamespace

import pytest
import torch
from families import FAMILIES, Family, build_trainer, train, write_data
from fairseq import checkpoint_utils

from fairseq_adaptive.errors import UsageError


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def checkpoint(data, tmp_path_factory):
    trainer, batches = build_trainer("shared_transformer", data)
    train(trainer, batches, 1)
    path = tmp_path_factory.mktemp("checkpoint") / "a.pt"
    trainer.consolidate_optimizer()
    trainer.save_checkpoint(str(path), {"train_iterator": {"epoch": 1, "version": 2, "iterations_in_epoch": 1}})
    return path


def restore(data, path, *flags, name="shared_transformer"):
    build_trainer(name, data, *flags)[0].load_checkpoint(str(path))


def test_same_training_loads(data, checkpoint):
    restore(data, checkpoint)


@pytest.mark.parametrize(
    "name,flags,said",
    (
        ("shared_transformer", ("--encoder-layers", "8", "--encoder-unique-layers", "4"), "layers"),
        ("shared_transformer", ("--encoder-ffn-embed-dim", "32"), "fc1"),
        ("stock", (), " is not that of these flags: .*TransformerModel.* Use the flags of its training"),
        ("transkimmer", (), "another architecture"),
        ("adatape_parity", (), "another architecture"),
        ("shared_transformer", ("--criterion", "label_smoothed_cross_entropy"), "Criterion does not match"),
        ("shared_transformer", ("--optimizer", "nag"), "Optimizer does not match"),
    ),
)
def test_other_training_is_refused(name, flags, said, data, checkpoint, monkeypatch):
    stock = "--task translation -s src -t tgt --arch transformer --encoder-embed-dim 16 --batch-size 9"
    monkeypatch.setitem(FAMILIES, "stock", Family("pairs", stock))
    with pytest.raises(UsageError, match=f"a.pt.*{said}"):
        restore(data, checkpoint, *flags, name=name)


@pytest.mark.parametrize("part", ("extra_state", "optimizer_history", "model"))
def test_part_of_a_checkpoint_is_refused(part, data, checkpoint, tmp_path):
    state = torch.load(checkpoint, weights_only=True)
    del state[part]
    torch.save(state, tmp_path / "part.pt")
    with pytest.raises(UsageError, match="part.pt (has no|is no checkpoint)"):
        restore(data, tmp_path / "part.pt")


@pytest.mark.parametrize("flag", ("--restore-file", "--finetune-from-model"))
def test_what_is_not_there_is_refused(flag, data, checkpoint, tmp_path):
    for path, said in (tmp_path / "none.pt", "does not exist"), (tmp_path, "is a folder"):
        trainer = build_trainer("shared_transformer", data, flag, str(path), "--save-dir", str(tmp_path / "new"))[0]
        with pytest.raises(UsageError, match=f"{flag} {path} {said}"):
            checkpoint_utils.load_checkpoint(trainer.cfg.checkpoint, trainer)
    trainer = build_trainer("shared_transformer", data, flag, str(checkpoint), "--save-dir", str(tmp_path / "new"))[0]
    checkpoint_utils.load_checkpoint(trainer.cfg.checkpoint, trainer, disable_iterator_cache=True)


@pytest.mark.parametrize("no_save", (False, True))
@pytest.mark.parametrize(
    "name", ("checkpoint_last.pt", "checkpoint_best.pt", "checkpoint7.pt", "checkpoint_last.pt.tmp")
)
@pytest.mark.parametrize(
    "make,said",
    (
        (lambda path: path.mkdir(), "is a folder, where a checkpoint is to be: move it away"),
        (lambda path: path.symlink_to("gone.pt"), "is a link to gone.pt, which is not there: mend or remove it"),
        (os.mkfifo, "is no file that can be read again: move it away"),
    ),
    ids=("folder", "link", "pipe"),
)
def test_what_is_no_file_in_the_place_of_a_checkpoint_is_refused(make, said, name, no_save, tmp_path):
    make(tmp_path / name)
    trainer = SimpleNamespace(
        cfg=SimpleNamespace(distributed_training=SimpleNamespace(distributed_rank=1)), checkpoint_suffix=""
    )
    cfg = SimpleNamespace(
        save_dir=str(tmp_path), no_save=no_save, restore_file="checkpoint_last.pt", finetune_from_model=None
    )
    with pytest.raises(UsageError) as error:
        checkpoint_utils.load_checkpoint(cfg, trainer)
    assert str(error.value) == f"{tmp_path / name} {said}"


def test_training_begins_with_a_policy_more(data, checkpoint, tmp_path):
    """What goes on is the same training; what begins anew may have another policy."""
    flags = ("--halting", "act", "--save-dir", str(tmp_path / "new"))
    with pytest.raises(UsageError, match="a.pt: .*halting"):
        restore(data, checkpoint, *flags)
    trainer = build_trainer("shared_transformer", data, "--finetune-from-model", str(checkpoint), *flags)[0]
    checkpoint_utils.load_checkpoint(trainer.cfg.checkpoint, trainer, disable_iterator_cache=True)
    weights = torch.load(checkpoint, weights_only=True)["model"]
    found = trainer.model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())
    assert {name.split(".")[2] for name in set(found) - set(weights)} == {"halting"}

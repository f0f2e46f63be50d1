"""Checkpoints for the tests of the page: of labels, translation and language models, hardly trained."""

import pytest
from families import build_trainer, train, write_data

FAMILIES = ("transkimmer", "pondernet", "mixture_of_recursions_lm", "par_transformer_xl", "adatape_vit")


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder with them, their data and a vocabulary."""
    folder = write_data(tmp_path_factory.mktemp("explore"))
    words = [line.split()[0] for line in (folder / "labels" / "input0" / "dict.txt").read_text().splitlines()]
    (folder / "tok").mkdir()
    (folder / "tok" / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words]) + "\n")
    for name in FAMILIES:
        trainer, batches = build_trainer(name, folder, "--max-update", "2")
        train(trainer, batches, 2)
        trainer._gathered_optim_state = None
        trainer.save_checkpoint(str(folder / f"{name}.pt"), {"train_iterator": {"epoch": 1, "iterations_in_epoch": 0}})
    return folder

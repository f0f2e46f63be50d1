"""One dial: a trained model at a share of its counterpart's multiply-adds, measured as the report measures it."""

import pytest
import torch
from families import build_trainer, train, write_data

from fairseq_adaptive.commands import dial as command
from fairseq_adaptive.criterions.controller import TOLERANCE
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.report.compute_report import describe
from fairseq_adaptive.report.dial import turn_to
from fairseq_adaptive.report.evaluated import Evaluated


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """``place(family, flags ...)``: a checkpoint whose policies decide otherwise from token to token."""
    folder, made = write_data(tmp_path_factory.mktemp("dial")), {}

    def checkpoint(family, *flags):
        if (family, flags) not in made:
            trainer, batches = build_trainer(family, folder, "--max-update", "5", *flags)
            train(trainer, batches, 1)
            for name, weight in trainer.model.named_parameters():
                if ".router." in name or ".halting." in name:
                    torch.nn.init.normal_(weight, std=0.5)
            trainer._gathered_optim_state = None
            path = made[family, flags] = folder / f"{len(made)}.pt"
            trainer.save_checkpoint(str(path), {"train_iterator": {"epoch": 1, "iterations_in_epoch": 0}})
        return made[family, flags]

    return checkpoint


LONG, SLOW = ("patience", "recursions"), pytest.mark.slow
SHARES = {
    "transkimmer": (0.5, "transkimmer"),
    "universal_transformer": (0.6, "universal_transformer"),
    "capacity in a decoder": (0.8, "mixture_of_depths_lm"),
    "capacity in both": (0.8, "mixture_of_recursions"),
    "recursions": (0.8, "token_choice_lm"),
    "patience": (0.85, "shared_transformer", "--decoder-halting", "patience"),
    "tape": (3.25, "adatape_parity"),
}


@pytest.mark.parametrize("case", [pytest.param(each, marks=SLOW if each in LONG else []) for each in SHARES])
def test_the_share_is_that_of_the_report(case, place, tmp_path, capsys):
    """Of the checkpoint that was written, read back, on the texts that it was turned on."""
    share, *family = SHARES[case]
    path, less = place(*family), ["--subset", "train", "--texts", "32", "--batch-size", "32"]
    command.main([str(path), "--compute", str(share), "--output", str(tmp_path / "new.pt"), *less])
    assert "of the counterpart's multiply-adds" in capsys.readouterr().out
    about = describe(Evaluated(tmp_path / "new.pt", subset="train", batch_size=32, texts=32))
    found = about["multiply_adds"]["total"] / about["counterpart"]["multiply_adds"]["total"]
    assert abs(found / share - 1) <= TOLERANCE
    with pytest.raises(UsageError, match="exists"):
        command.main([str(path), "--compute", "0.5", "--output", str(tmp_path / "new.pt")])


def test_what_cannot_be_turned(place):
    with pytest.raises(UsageError, match="out of reach: turned from end to end, skimming spends 0"):
        turn_to(Evaluated(place("transkimmer"), subset="train", batch_size=8, texts=8), 0.001)
    with pytest.raises(UsageError, match="--router skimming or --halting act"):
        turn_to(Evaluated(place("shared_transformer"), subset="train", batch_size=8, texts=8), 0.5)

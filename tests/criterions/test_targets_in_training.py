"""Targets of depth, tape and compute in short trainings: what evaluation spends comes near them, and a miss is said."""

import logging

import pytest
from families import FAMILIES, Family, build_trainer, train, write_data
from fairseq.logging import metrics

LABELS = FAMILIES["transkimmer"].flags.split("--arch")[0]
TAPE = Family(
    "labels",
    f"{LABELS} --arch adatape_tiny --encoder-layers 2 --encoder-embed-dim 32 --encoder-ffn-embed-dim 64 "
    "--encoder-attention-heads 2 --tape-tokens 6 --tape-threshold 2 --batch-size 48 "
    "--criterion adaptive_compute_loss --task-criterion sentence_prediction",
)
UPDATES = 60
# name: family, flags, target, by how much of itself it may be missed: depths and tapes are whole numbers of steps, and
# texts as alike as these take the next one together
CASES = {
    "depth": ("universal_transformer", "--target-depth 2.5", 2.5, 0.25),
    "tape": ("tape", "--target-tape 4", 4.0, 0.3),
    "compute": ("par_supernet", f"--max-update {UPDATES}", 0.5, None),
}
SEARCH = "--optimizer architecture_adam --architecture-warmup-updates 0 --architecture-lr 0.01"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


def spent(trainer, batches, name):
    """What evaluation spends of a target, by the log."""
    with metrics.aggregate(new_root=True) as log:
        for each in batches:
            trainer.valid_step(each)
    return log[f"_spent_{name}"].avg


@pytest.mark.slow
def test_what_the_warning_advises_helps(data, caplog):
    """A target of compute is a bound: a higher learning rate of the architecture comes below it in as many updates."""
    trainer, batches = build_trainer("par_supernet", data, "--max-update", str(UPDATES), *SEARCH.split())
    trainer.criterion.prepare_targets(UPDATES)
    batches = list(batches)
    for _ in range(-(-UPDATES // len(batches))):
        train(trainer, batches[: UPDATES - trainer.get_num_updates()], UPDATES)
    assert trainer.get_num_updates() == UPDATES and 0.4 < spent(trainer, batches[:4], "compute") <= 0.5 * 1.03
    with caplog.at_level(logging.WARNING):
        trainer.criterion.report_targets(UPDATES)
    assert "was missed" not in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_target_is_neared_or_its_miss_is_said(data, monkeypatch, caplog, name):
    monkeypatch.setitem(FAMILIES, "tape", TAPE)
    family, flags, target, within = CASES[name]
    trainer, batches = build_trainer(family, data, *flags.split())
    trainer.criterion.prepare_targets(UPDATES)
    batches = list(batches)
    before = spent(trainer, batches[:4], name)
    for start in range(0, UPDATES, len(batches)):
        train(trainer, batches[: UPDATES - start], UPDATES)
    assert trainer.get_num_updates() == UPDATES
    after = spent(trainer, batches[:4], name)
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        trainer.criterion.report_targets(UPDATES)
    said = [each.getMessage() for each in caplog.records if "was missed" in each.getMessage()]
    assert bool(said) == (abs(after / target - 1) > 0.03), (before, after, said)
    if said:
        assert said[0].startswith(f"--target-{name} {target:g} was missed: it is {after:.3f} after {UPDATES} updates")
    if within is None:
        assert after < before
    else:
        assert abs(after / target - 1) <= within and (after != before or not said), (before, after)


@pytest.mark.parametrize("family, compute", (("mixture_of_depths_lm", 0.6), ("mixture_of_recursions", 0.7)))
def test_compute_moves_the_capacity(data, family, compute):
    trainer, batches = build_trainer(family, data, "--compute", str(compute), "--max-update", "30")
    trainer.criterion.prepare_targets(30)
    batches = list(batches)
    logs = [each for start in range(0, 30, len(batches)) for each in train(trainer, batches[: 30 - start], 30)]
    sides = [name for name in logs[-1] if name.endswith("_flops")]  # of equal stacks
    found = sum(each[name] for each in logs[-5:] for name in sides) / 5 / len(sides)
    assert found == pytest.approx(compute, rel=0.05), (found, sides)
    assert all(each.shift is not None for each in trainer.model.modules() if hasattr(each, "shift"))

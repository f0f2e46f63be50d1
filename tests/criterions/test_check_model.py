"""What a criterion cannot train is refused when the trainer is built, before data are read and anything is written."""

import os
import re

import pytest
import torch
from cli.helpers import USER_DIR, call
from families import FAMILIES, build_trainer, write_data
from fairseq.criterions import CRITERION_REGISTRY
from fairseq.trainer import Trainer

from fairseq_adaptive.errors import UsageError

ADAPTIVE = "--criterion adaptive_compute_loss --task-criterion"
# family, flags, what is said
REFUSED = (
    ("shared_transformer", f"{ADAPTIVE} cross_entropy", "needs a model with a policy"),
    ("shared_transformer", "--criterion ponder_loss --task-criterion cross_entropy", "add --halting act"),
    ("shared_transformer", "--criterion skim_loss --task-criterion cross_entropy", "needs a model that skims"),
    ("shared_transformer", "--criterion adaptive_cross_entropy", "give it one with --adaptive-softmax-cutoff"),
    ("shared_transformer", "--criterion span_prediction", "a model that it can give a span head"),
    ("shared_transformer", "--criterion masked_lm_sop", "use --task masked_lm_sop"),
    ("albert_act", "--criterion masked_lm_sop", "use --task masked_lm_sop"),
    (
        "par_transformer_xl",
        "--criterion adaptive_loss --ddp-backend legacy_ddp",
        "use --criterion adaptive_cross_entropy",
    ),
    (
        "halting_transformer_xl",
        "--task-criterion adaptive_loss --ddp-backend legacy_ddp",
        "use --criterion adaptive_cross_entropy",
    ),
    ("shared_transformer", "--criterion adaptive_loss --ddp-backend legacy_ddp", "add --adaptive-softmax-cutoff"),
    ("par_transformer_xl", "--criterion architecture_entropy_loss", "is for --arch par_supernet"),
    ("par_transformer_xl", "--criterion fused_label_smoothed_cross_entropy", "it has an adaptive softmax"),
    ("adatape_vit", "--criterion fused_label_smoothed_cross_entropy", "no decoder that gives features"),
    ("universal_transformer", f'{ADAPTIVE} cross_entropy --prices {{"skimming":1}}', "--prices names 'skimming'"),
    (
        "universal_transformer",
        f'{ADAPTIVE} cross_entropy --prices {{"act":{{"rate":1}}}}',
        "price of encoder_act has no option 'rate'",
    ),
    (
        "universal_transformer",
        f'{ADAPTIVE} cross_entropy --prices {{"act":"much"}}',
        "weight in the price of encoder_act is 'much'",
    ),
    ("universal_transformer", f'{ADAPTIVE} cross_entropy --prices {{"act":NaN}}', "of encoder_act is nan"),
    (
        "pondernet",
        f'{ADAPTIVE} cross_entropy --prices {{"pondernet":{{"prior_rate":1}}}}',
        "prior_rate in the price of encoder_pondernet is 1",
    ),
    ("universal_transformer", f"{ADAPTIVE} cross_entropy --target-flops 0.5", "--target-flops steers the router"),
    ("universal_transformer", f"{ADAPTIVE} cross_entropy --target-depth 4.5", "the model has 4 depths"),
    (
        "universal_transformer",
        f'{ADAPTIVE} cross_entropy --target-depth 2 --target-args {{"depth":{{"gain":"x"}}}}',
        "gain in --target-args depth is 'x'",
    ),
    ("shared_transformer", f"{ADAPTIVE} cross_entropy --compute 0.5", "needs a policy that leaves tokens out"),
    ("adatape_parity", f"{ADAPTIVE} cross_entropy --compute 0.5", "add --router skimming or --halting act"),
    ("universal_transformer", f"{ADAPTIVE} cross_entropy --compute 0.5 --target-depth 2", "place of --target-depth"),
    ("pondernet", f"{ADAPTIVE} cross_entropy --compute 0.5", "set --prior-rate to 1 over it"),
    ("universal_transformer", f"{ADAPTIVE} adaptive_cross_entropy", "give it one with --adaptive-softmax-cutoff"),
    ("pondernet", "--target-depth 2", "set --prior-rate to 1 over it"),
    (
        "transkimmer",
        f"--halting pondernet {ADAPTIVE} sentence_prediction --regression-target --num-classes 1",
        "needs scores of classes",
    ),
    ("albert_act", '--halting act --reader tape --reader-args {"depth":9}', "a reader at depth 9 never reads"),
    ("albert_act", '--halting-kv keep --reader tape --reader-args {"depth":1}', "reads after the first layer"),
    (
        "shared_transformer",
        '--encoder-halting act --halting-kv keep --reader tape --reader-args {"depth":1}',
        "reads after the first layer",
    ),
    (
        "adatape_parity",
        "--encoder-layers 2 --encoder-unique-layers 1 --halting act --halting-kv keep --tape-layer 1",
        "reads after the first layer",
    ),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = write_data(tmp_path_factory.mktemp("data"))
    numbers = folder / "labels" / "label" / "train.label"  # a regression reads this file, a classification others
    numbers.write_text("".join(f"{len(line)}\n" for line in numbers.read_text().splitlines()))
    return folder


OF_CRITERIONS = re.compile(
    r"--(criterion|task-criterion|label-smoothing|time-penalty|kl-weight|entropy-weight|target-compute|skim-factor) \S+"
)


def bare(family):
    """A family without the flags of its criterion."""
    return FAMILIES[family]._replace(flags=OF_CRITERIONS.sub("", FAMILIES[family].flags))


@pytest.mark.parametrize("family,flags,said", REFUSED, ids=lambda value: str(value)[:60])
def test_refused_before_training(data, family, flags, said, monkeypatch):
    if "--criterion" in flags:
        monkeypatch.setitem(FAMILIES, family, bare(family))
    with pytest.raises(UsageError) as raised:
        build_trainer(family, data, *flags.split())
    assert said in str(raised.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_fits_is_not_refused(data, family):
    trainer, _ = build_trainer(family, data, "--max-update", "5")
    check = getattr(trainer._criterion, "check_model", None)
    assert check is None or check(trainer._model) is None


def test_every_criterion_of_ours_that_refuses_models_says_so_early():
    """None of them raises a UsageError in a first step that ``check_model`` does not raise."""
    ours = {name: cls for name, cls in CRITERION_REGISTRY.items() if cls.__module__.startswith("fairseq_adaptive.")}
    assert len(ours) >= 9 and all(hasattr(cls, "check_model") for cls in ours.values())


def test_nothing_is_left_behind(data, tmp_path):
    with pytest.raises(UsageError, match="has no adaptive softmax"):
        call(
            "fairseq-train",
            data / "pairs",
            *("--user-dir", USER_DIR, "--save-dir", tmp_path / "saved", "--cpu", "--disable-validation"),
            *f"{bare('shared_transformer').flags} --criterion adaptive_cross_entropy --optimizer adam".split(),
        )
    assert os.listdir(tmp_path / "saved") == []


def test_a_late_refusal_leaves_no_crash_file(data, tmp_path):
    """Where only a batch tells, nothing has been learned yet that a crash.pt would hold; later there is one."""
    trainer, batches = build_trainer("shared_transformer", data, "--save-dir", str(tmp_path))
    batch = next(batches)

    def refuse(*args):
        raise UsageError("only this batch tells")

    forward = trainer._criterion.forward
    trainer._criterion.forward = refuse
    with pytest.raises(UsageError, match="only this batch tells"):
        trainer.train_step([batch])
    assert os.listdir(tmp_path) == []
    trainer._criterion.forward = forward
    trainer.train_step([batch])
    trainer._criterion.forward = refuse
    with pytest.raises(UsageError, match="only this batch tells"):
        trainer.train_step([batch])
    assert os.listdir(tmp_path) == ["crash.pt"]


def test_changed_layers_are_refused_before_training(data):
    """Keys and values cannot be kept of attention that something replaced; validation would have said so."""
    trainer, _ = build_trainer("universal_transformer", data, "--halting-kv", "keep")
    model = trainer._model
    model.decoder.layers.layer(0).self_attn.register_forward_hook(lambda *args: None)
    with pytest.raises(UsageError, match="keep keeps the keys and values of attention, but here"):
        Trainer(trainer.cfg, trainer.task, model, trainer._criterion)
    assert isinstance(model, torch.nn.Module)
